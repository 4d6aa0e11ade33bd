"""One video over several processes: PSA under diffusers' context parallelism, on two CPU processes."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import diffusers
import pytest
import torch
from forwards import error

from psa_diffusers.processors.ulysses import deal

ROOT = Path(__file__).parents[2]
RANKS = 2
exact = pytest.mark.parametrize(
    "case", ["psa-first", "parallel-first", "factor-one", "odd", "odd-heads", "uneven", "kept"]
)

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "ContextParallelConfig"),
    reason=f"diffusers {diffusers.__version__} has no context parallelism",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process got. They run once for all tests: starting them is what takes long."""
    folder = tmp_path_factory.mktemp("ulysses")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [*command, ROOT / "tests" / "processors" / "ulysses_worker.py", folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@exact
def test_over_two_processes_it_is_the_video_of_one(found, case):
    for rank in found:
        alone, together = rank[case]["alone"], rank[case]["together"]
        assert torch.equal(together["video"], alone["video"])
        assert torch.equal(rank[case]["again"]["video"], alone["video"]), "heads may be dealt otherwise by now"
        assert torch.equal(rank[case]["dense together"], rank[case]["dense alone"])
        if case != "factor-one":
            assert error(alone["video"], rank[case]["dense alone"]) > 1e-3, "PSA must matter"


@exact
def test_the_same_calls_are_sparse_as_in_one_process(found, case):
    for rank in found:
        alone, together = (
            [
                (record["step"], record["layer"], record["kind"], record["grid"])
                for record in rank[case][which]["records"]
            ]
            for which in ("alone", "together")
        )
        assert together == alone
        kinds = {(step, kind) for step, _, kind, _ in together}
        warmup = set() if case in ("factor-one", "uneven") else {(0, "dense")}
        assert kinds == warmup | {(step, "sparse") for step in range(len(warmup), 4)}


@pytest.mark.parametrize("case", ["psa-first", "factor-one", "odd", "uneven"])  # each process has as many heads
def test_the_density_of_all_heads_is_the_mean_of_the_processes(found, case):
    for alone, *together in zip(
        found[0][case]["alone"]["records"], *(rank[case]["together"]["records"] for rank in found), strict=True
    ):
        assert sum(record["density"] for record in together) / RANKS == pytest.approx(alone["density"])


def test_equal_heads_stay_where_they_are(found):
    """By rank every head reads the same share: dealing could win nothing."""
    for rank in found:
        assert rank["psa-first"]["orders"] == [None, None]


def test_heads_that_read_much_do_not_pile_up_in_one_process(found):
    by_call = defaultdict(list)
    for rank in found:
        for place, record in enumerate(rank["uneven"]["again"]["records"]):
            by_call[place].append(record["density"])
    first = [rank["uneven"]["together"]["records"][0]["density"] for rank in found]
    assert max(first) > 1.3 * min(first), "the first call deals them as they come, and they differ"
    spread = [max(densities) / min(densities) for densities in by_call.values()]
    assert max(spread) < 1.1
    for mine, other in zip(*(rank["uneven"]["orders"] for rank in found), strict=True):
        assert torch.equal(mine, other), "all processes deal alike"
        assert sorted(mine.tolist()) == list(range(8))
        assert mine.tolist() != list(range(8))


def test_level_maps_are_kept_where_heads_stay_and_made_anew_where_they_are_dealt(found):
    for rank in found:
        for which in ("alone", "together", "again"):
            kept = {(record["step"], record["kept"]) for record in rank["kept"][which]["records"]}
            assert kept == {(0, False), (1, False), (2, True), (3, False)}  # the first step is dense
        dealt = {(record["kept"], record["reason"]) for record in rank["kept, uneven"]["together"]["records"]}
        assert dealt == {(False, "its heads are dealt to the processes anew in every call")}


@pytest.mark.parametrize("when", ["enabling", "calling"])
def test_ring_attention_is_refused_with_the_remedy(found, when):
    for rank in found:
        assert "use ContextParallelConfig(ulysses_degree=...), or call disable_psa(pipe)" in rank[f"ring, {when}"]


def test_a_plan_of_the_users_own_runs_dense_and_the_report_says_why(found):
    for rank in found:
        sparse = [record for record in rank["own plan"]["records"] if record["step"] > 0]
        assert {record["reason"] for record in sparse} == {
            "the class of the denoiser has no plan of its own for context parallelism"
        }


@pytest.mark.parametrize("degree", [2, 4])
def test_dealing_evens_out_the_costs(degree, rng):
    costs = torch.rand(8 * degree, generator=rng) ** 3
    dealt = costs[deal(costs, degree)].view(degree, -1)
    assert torch.equal(dealt.flatten().sort().values, costs.sort().values)
    sums = dealt.sum(1)
    # forth and back: what one process gets more in a round is less than what it then gets less
    assert float(sums.max() - sums.min()) <= float(costs.max())
    sorted_blocks = costs.sort().values.view(degree, -1).sum(1)
    assert float(sums.max()) < 0.7 * float(sorted_blocks.max())


def test_equal_costs_are_dealt_in_order():
    assert deal(torch.ones(8), 2).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_the_benchmark_runs(tmp_path):
    """Whether the program works; the times of a test mean nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    options = ["--shape", "smoke", "--device", "cpu", "--dtype", "float32", "--backend", "native", "--layers", "1"]
    done = subprocess.run(
        [
            *command,
            "-m",
            "scripts.benchmarks.parallel",
            *options,
            "--repeats",
            "1",
            "--json",
            tmp_path / "x.jsonl",
        ],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["attention"] for line in lines] == [
        "dense",
        "psa_cover",
        "psa_balanced",
        "psa_balanced, heads as they come",
    ]
    assert all(line["gpus"] == RANKS and line["relative_l1_to_one"] < 1e-4 for line in lines)
    assert all(len(line["density_by_process"]) == RANKS for line in lines)
    assert lines[0]["density"] == 1 > lines[1]["density"]


def test_the_page_quotes_what_was_measured():
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    rows = ["|".join(line.split("|")[2:]) for line in page.splitlines() if line.startswith("|") and " s |" in line]
    lines = (ROOT / "docs" / "benchmarks" / "parallel.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("one_s", "several_s", "speedup", "efficiency", "speedup_over_dense_on_one")
    assert len(rows) == len(lines) == 4
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        quoted = re.findall(r"\d*\.?\d+", row)
        for text, value in zip(quoted, [*line["density_by_process"], *(line[name] for name in names)], strict=True):
            half = 0.5 * 10.0 ** -len(text.partition(".")[2])
            assert abs(float(text) - value) <= half + 1e-9, f"{line['attention']}: {text} for {value}"
        assert line["relative_l1_to_one"] == 0, "the page says: to the bit"
