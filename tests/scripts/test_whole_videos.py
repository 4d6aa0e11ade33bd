"""The benchmark of whole videos: what it adds up, on a model that a CPU can run."""

import json
import statistics

import pytest

from scripts.benchmarks.video import main, parse


def test_each_kind_of_step_counts_as_often_as_it_occurs_in_the_long_run(tmp_path):
    path = tmp_path / "lines.jsonl"
    told = ["--models", "smoke", "--presets", "psa_cover", "--steps", "3", "--as_steps", "20", "--device", "cpu"]
    assert main([*told, "--json", str(path)]) == 0
    dense, sparse = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (dense["preset"], dense["dense_steps"]) == ("dense", 20)
    assert (sparse["preset"], sparse["dense_steps"]) == ("psa_cover", 15)
    first, *others = sparse["step_seconds"]
    expected = 15 * first + 5 * statistics.median(others) + sparse["decoding_seconds"]
    assert sparse["seconds"] == pytest.approx(expected, abs=0.02)
    assert dense["seconds"] == pytest.approx(
        20 * statistics.median(dense["step_seconds"]) + dense["decoding_seconds"], abs=0.02
    )
    assert sparse["speedup"] == pytest.approx(dense["seconds"] / sparse["seconds"], abs=1e-3)
    assert 0 < sparse["sparse_density"] < 1
    assert dense["finite"]
    assert sparse["finite"]


def test_too_short_a_call_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--steps", "2"])
    assert "--steps must be at least 3" in capsys.readouterr().err
