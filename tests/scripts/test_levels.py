"""scripts.benchmarks.levels as a person runs it, on heads small enough to take seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.benchmarks.acceptance import PRESETS, show_acceptance

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--field_grid", "6", "12", "16", "--queries", "256", "--densities", "0.1", "0.3")


def run_script(*args):
    return subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.levels", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Printed table, JSON lines by case and method, and the folder of the files, of one run over two fields."""
    folder = tmp_path_factory.mktemp("levels")
    files = ("--json", folder / "levels.jsonl", "--json_table", folder / "table.jsonl", "--plot", folder / "levels.png")
    done = run_script("--fields", "A", "F", *TINY, *files)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "levels.jsonl").read_text().splitlines()]
    return done.stdout, {(line["case"], line["method"]): line for line in lines}, folder


def test_dense_attention_has_no_error(fields):
    _, lines, _ = fields
    dense = [line for (_, method), line in lines.items() if method == "dense"]
    assert len(dense) == 2
    assert all(line["relative_l1"] == 0 and line["density"] == 1 for line in dense)


def test_error_falls_with_density(fields):
    _, lines, _ = fields
    for case in {case for case, _ in lines}:
        for name in ("published", "top, rest dropped", "top + mean, zeroth order, 64"):
            coarse, fine = lines[case, f"{name} @0.1"], lines[case, f"{name} @0.3"]
            assert coarse["density"] < fine["density"]
            assert coarse["relative_l1"] > fine["relative_l1"]


def test_a_mean_in_place_of_nothing_lowers_the_error(fields):
    _, lines, _ = fields
    for case in {case for case, _ in lines}:
        covered, dropped = lines[case, "top + mean, zeroth order, 128 @0.3"], lines[case, "top, rest dropped @0.3"]
        assert covered["relative_l1"] < dropped["relative_l1"]


def test_attention_mass_is_shared_out_in_full(fields):
    _, lines, _ = fields
    for line in lines.values():
        assert sum(line["mass_by_factor"].values()) == pytest.approx(1, abs=1e-3)


def test_table_and_picture_are_made(fields):
    table, lines, folder = fields
    assert all(method in table for _, method in lines)
    assert (folder / "levels.png").stat().st_size > 10_000
    rows = [json.loads(row) for row in (folder / "table.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {method for _, method in lines}
    for row in rows:
        heads = [line["relative_l1"] for (_, method), line in lines.items() if method == row["method"]]
        assert row["heads"] == len(heads) == 2
        assert row["relative_l1"] == pytest.approx(sum(heads) / 2, rel=1e-3)


def test_another_seed_is_another_field(fields):
    _, lines, folder = fields
    few = ("--field_grid", 6, 12, 16, "--queries", 256, "--densities", 0.3, "--presets", "psa_cover")
    done = run_script("--fields", "A", *few, "--field_seed", 7, "--json", folder / "seed.jsonl")
    assert done.returncode == 0, done.stderr
    other = {line["method"]: line for line in map(json.loads, (folder / "seed.jsonl").read_text().splitlines())}
    assert other["psa_cover"]["case"].endswith("seed7")
    assert other["psa_cover"]["relative_l1"] != lines["A 6x12x16 D64 text0 seed0", "psa_cover"]["relative_l1"]


def test_recorded_heads_are_read_with_their_grid(tmp_path, rng):
    heads = {part: torch.randn(1, 2, 4 * 8 * 8 + 6, 16, generator=rng).half() for part in "qkv"}
    save_file({f"layer0.{part}": x for part, x in heads.items()}, tmp_path / "qkv.safetensors")
    args = ("--qkv", tmp_path / "qkv.safetensors", "--densities", "0.3", "--json", tmp_path / "out.jsonl")
    refused = run_script(*args)
    assert refused.returncode != 0
    assert "pass --grid" in refused.stderr
    done = run_script(*args, "--grid", 4, 8, 8, "--text_tokens", 6, "--part", "odd")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {line["case"] for line in lines} == {"layer0.0.1"}
    assert all(torch.isfinite(torch.tensor(line["relative_l1"])) for line in lines)


def test_what_a_pipeline_recorded_is_read_without_a_word(tmp_path):
    from tiny import CASES

    from psa_diffusers import record_qkv

    pipe = CASES["cogvideox"].build()
    with torch.no_grad(), record_qkv(pipe, tmp_path / "qkv.safetensors", steps=0, heads=0):
        CASES["cogvideox"].run(pipe, grid=(4, 8, 8), steps=1)
        CASES["cogvideox"].run(pipe, grid=(3, 7, 8), steps=1)
    args = ("--qkv", tmp_path / "qkv.safetensors", "--densities", "0.3", "--json", tmp_path / "out.jsonl")
    done = run_script(*args)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len({line["case"] for line in lines}) == 2 * 2 * 2, "calls, layers, branches"
    assert all(line["relative_l1"] == 0 for line in lines if line["method"] == "dense")


def test_the_acceptance_suite_judges_our_presets(tmp_path):
    args = ("--suite", "acceptance", "--field_grid", "6", "9", "11", "--queries", "128", "--fields", "A", "J")
    qkv = ROOT / "docs" / "data" / "trained_head.safetensors"
    done = run_script(*args, "--qkv", qkv, "--json", tmp_path / "acceptance.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "acceptance.jsonl").read_text().splitlines()]
    by_group = {group: {line["case"] for line in lines if line["group"] == group} for group in ("fields", "other")}
    assert [len(cases) for cases in by_group.values()] == [4, 4], "two sizes of heads, with and without text"
    assert {"published", "psa_cover", "psa_fast", "psa_quality", "first order psa_cover 64"} <= {
        line["method"] for line in lines
    }
    missed = done.stdout.count("MISSED")
    held = int(done.stdout.split(" bounds hold")[0].split("\n")[-1].split(" of ")[0])
    assert held + missed == 25
    assert done.returncode == (1 if missed else 0)


def test_a_missed_bound_is_named_and_fails(capsys):
    def line(method, error):
        return {"group": "recorded", "case": "head", "method": method, "density": 0.07, "relative_l1": error}

    peers = [line(f"first order {name} {block}", 0.3) for name in PRESETS for block in (64, 128)]
    good = [line("published", 0.2) | {"density": 0.15}, *(line(name, 0.07) for name in PRESETS), *peers]
    assert show_acceptance(good)
    assert "MISSED" not in capsys.readouterr().out
    bad = [line("psa_cover", 0.1) if entry["method"] == "psa_cover" else entry for entry in good]
    assert not show_acceptance(bad)
    assert "0.500 (<= 0.480, MISSED)" in capsys.readouterr().out


def test_the_docs_quote_what_was_measured(capsys):
    def rows_of(name):
        return [json.loads(line) for line in (ROOT / "docs" / "benchmarks" / name).read_text().splitlines()]

    page = (ROOT / "docs" / "developer" / "levels.md").read_text(encoding="utf-8")
    lines = rows_of("levels_acceptance.jsonl")
    assert show_acceptance(lines)
    assert "25 of 25 bounds hold" in capsys.readouterr().out
    errors = {(line["group"], line["method"], line["case"]): line["relative_l1"] for line in lines}

    def quoted(start):
        (row,) = (row for row in page.splitlines() if row.startswith(f"| {start}"))
        return [float(cell.split()[0]) for cell in row.split("|")[2:5]]

    for number, name in enumerate(PRESETS):
        heads = {
            case: error for (group, method, case), error in errors.items() if (group, method) == ("recorded", name)
        }
        published = sum(errors["recorded", "published", case] for case in heads)
        assert quoted("trained heads: ratio of the mean errors")[number] == round(sum(heads.values()) / published, 3)
        assert quoted("worst head (published .610)")[number] == round(max(heads.values()), 3)
        ratios = [
            error / errors[group, "published", case]
            for (group, method, case), error in errors.items()
            if (group, method) == ("fields", name)
        ]
        assert quoted("fields A to H, other seeds")[number] == round(sum(ratios) / len(ratios), 3)
        assert quoted("largest ratio")[number] == round(max(ratios), 2)
        for model in ("demo", "Wan", "miniature", "miniature Wan"):
            file = f"levels_recorded_{model.lower().replace(' ', '_')}.jsonl"
            table = {line["method"]: line for line in rows_of(file)}
            assert quoted(f"{model}: ratio of")[number] == round(table[name]["ratio_of_means"], 3)
