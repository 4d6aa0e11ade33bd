"""What `psa_report` tells, and that it costs nothing when nobody asks."""

import sys

import pytest
import torch
from tiny import CASES, TINY_PRESET

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import Recorder, psa_report
from psa_diffusers.pipelines.state import state_of
from psa_diffusers.processors import sparse as processor

FIELDS = {"step", "denoiser", "layer", "kind", "reason", "density", "kept", "tokens", "grid"}


def enable(name, **kwargs):
    return enable_psa(CASES[name].build(), **{**TINY_PRESET, "warmup_steps": 1, "report": True, **kwargs})


@pytest.mark.parametrize("name", CASES)
def test_every_call_of_every_self_attention_has_a_complete_record(name):
    pipe = enable(name)
    case = CASES[name]
    case.run(pipe, steps=3)
    records = psa_report(pipe).records
    assert len(records) == 3 * 2 * case.passes
    for record in records:
        assert record.keys() == FIELDS
        assert record["kind"] == ("dense" if record["step"] == 0 else "sparse")
        assert record["reason"] == ("warm-up" if record["step"] == 0 else "")
        assert isinstance(record["density"], float)
        assert record["density"] == 1.0 if record["kind"] == "dense" else 0 < record["density"] < 1
        assert record["grid"] == case.grid
        assert record["tokens"] == case.grid[0] * case.grid[1] * case.grid[2] + case.text
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert len({record["layer"] for record in records}) == 2


def test_the_report_is_of_the_last_call_and_a_copy():
    pipe = enable("wan2.1")
    CASES["wan2.1"].run(pipe, steps=4)
    first = psa_report(pipe)
    CASES["wan2.1"].run(pipe, steps=2, guidance=1.0)
    assert len(first.records) == 16
    assert len(psa_report(pipe).records) == 4


def test_an_interrupted_call_can_be_read():
    pipe = enable("wan2.1")

    def callback(pipeline, index, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CASES["wan2.1"].run(pipe, callback_on_step_end=callback)
    assert len(psa_report(pipe).records) == 4


def test_recording_changes_no_bit():
    pipe = enable("cogvideox", report=False)
    silent = CASES["cogvideox"].run(pipe)
    disable_psa(pipe)
    enable_psa(pipe, **{**TINY_PRESET, "warmup_steps": 1}, report=True)
    assert torch.equal(CASES["cogvideox"].run(pipe), silent)


def test_density_is_that_of_the_levels_that_ran():
    ratios = {1: [0, 0.5], 2: [0.5, 1]}
    pipe = enable("wan2.1", mask_ratios=ratios, warmup_steps=0)
    CASES["wan2.1"].run(pipe, steps=1, grid=(4, 4, 8))  # 8 blocks of 16 keys: 4 in full, 4 at half
    assert {record["density"] for record in psa_report(pipe).records} == {0.75}


def test_the_summary_counts_calls_densities_and_reasons():
    pipe = enable("wan2.2-a14b", mask_ratios={1: [0, 0.5], 2: [0.5, 1]})
    CASES["wan2.2-a14b"].run(pipe, grid=(4, 4, 8))
    summary = psa_report(pipe).summary()
    assert summary == str(psa_report(pipe))
    assert summary.splitlines() == [
        "PSA preset 'psa_cover' of section Wan2.2_A14B, the nearest one: no section was made for 2 heads and 2 layers",
        "transformer: 8 calls in 2 steps and 2 layers: 4 sparse, 4 dense",
        "  density 0.750 where sparse, 0.875 over all calls",
        "  128 tokens, grid 4 x 4 x 8",
        "  dense in 4 calls: warm-up",
        "transformer_2: 8 calls in 2 steps and 2 layers: 8 sparse, 0 dense",
        "  density 0.750 where sparse, 0.750 over all calls",
        "  128 tokens, grid 4 x 4 x 8",
    ]


def test_an_empty_report_says_so():
    report = psa_report(enable("wan2.1"))
    assert "no self-attention has run since PSA was enabled" in report.summary()
    with pytest.raises(RuntimeError, match="the report is empty"):
        report.plot()


def test_a_run_without_a_sparse_call_says_so():
    pipe = enable("wan2.1", preset="baseline")
    CASES["wan2.1"].run(pipe, steps=1)
    assert "nothing ran sparse" in psa_report(pipe).summary()


def test_the_picture_has_a_panel_a_denoiser_and_a_cell_a_step_and_layer(tmp_path):
    pytest.importorskip("matplotlib")
    pipe = enable("wan2.2-a14b")
    CASES["wan2.2-a14b"].run(pipe)
    figure = psa_report(pipe).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert [image.shape for image in images[:2]] == [(2, 4), (2, 4)]
    assert float(images[0][0, 0]) == 1.0  # warm-up
    assert float(images[0][0, 1]) < 1.0


def test_a_picture_without_matplotlib_names_the_remedy(monkeypatch):
    pipe = enable("wan2.1")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        psa_report(pipe).plot()


def test_without_report_nothing_is_recorded_and_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(Recorder, "note", None)
    asked = []
    real = processor.psa_attention
    monkeypatch.setattr(processor, "psa_attention", lambda *a, **kw: asked.append(kw) or real(*a, **kw))
    pipe = enable("wan2.1", report=False)
    CASES["wan2.1"].run(pipe)
    assert asked
    assert all("return_schedule" not in kw for kw in asked)
    with pytest.raises(RuntimeError, match=r"enable_psa\(pipe, report=True\)"):
        psa_report(pipe)


def test_after_disable_there_is_no_report():
    pipe = disable_psa(enable("wan2.1"))
    with pytest.raises(RuntimeError, match="there is no report"):
        psa_report(pipe)


def test_recording_reads_no_density(monkeypatch):
    """What would synchronise a GPU: turning the density into a number during the run."""
    pipe = enable("wan2.1")
    CASES["wan2.1"].run(pipe)
    sparse = [entry for entry in state_of(pipe).switch.run.recorder.entries if entry["kind"] == "sparse"]
    assert all(isinstance(entry["density"], torch.Tensor) and entry["density"].ndim == 0 for entry in sparse)
