"""calibrate on small real pipelines: targets are met, work is not done twice, and the file says what was found."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_disk import largest_file
from tiny import CASES

from psa_diffusers import calibrate, enable_psa, load_preset, psa_report
from psa_diffusers.calibration.assemble import write_preset
from psa_diffusers.calibration.ladder import DENSITIES, ladder_ratios
from psa_diffusers.calibration.search import Cell, choose, mean
from psa_diffusers.pipelines.enable import find_denoisers
from psa_diffusers.presets import PSAPreset

PROMPTS = ["a cat walks", "rain on a lake", "two red boats"]
BASE = PSAPreset(
    block_size={"m": 16, "n": 16, "tile_n": 16},
    mask_ratios={1: [0, 0.2], 16: [0.2, 1]},
    rearrange_method="boxes",
    importance="pooled_moments",
    key_variance=True,
    value_tilt=True,
    tilt_gain="sampled",
    warmup_steps=1,
)
GRID = (4, 8, 8)
one_of_each = pytest.mark.parametrize("name", ["cogvideox", "wan2.1"])


class Stop(Exception):
    pass


def run(kind, tmp_path, pipe=None, **kwargs):
    """Calibrate a tiny pipeline of sharper attention than its random weights give."""
    case = CASES[kind]
    if pipe is None:
        pipe = sharp(kind)
    inputs = case.inputs(steps=5, grid=GRID)
    call = {key: value for key, value in inputs.items() if key not in ("prompt", "generator", "output_type")}
    options = {"path": tmp_path / "made.yaml", "preset": BASE, "parts": 4, "progress": False, **kwargs}
    return calibrate(pipe, options.pop("prompts", PROMPTS), **options, **call)


def sharp(name):
    pipe = CASES[name].build()
    with torch.no_grad():
        for _, denoiser, family in find_denoisers(pipe):
            for attention in family.self_attentions(denoiser).values():
                attention.norm_q.weight.mul_(3)
    return pipe


def count_runs(pipe):
    """Prompts of the calls of a pipeline, from now on."""
    seen = []
    encode = pipe.encode_prompt

    def noting(*args, **kwargs):
        seen.append(kwargs.get("prompt", args[0] if args else None))
        return encode(*args, **kwargs)

    pipe.encode_prompt = noting
    return seen


def density_of(ratios):
    return sum((end - start) / factor for factor, (start, end) in ratios.items() if factor)


@pytest.mark.parametrize("block_n", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("density", [*DENSITIES, 0.9])
def test_a_rung_has_its_density_and_reads_everything(density, block_n):
    ratios = ladder_ratios(density, block_n)
    preset = PSAPreset(block_size={"m": 128, "n": block_n}, mask_ratios=ratios)
    assert 0 not in dict(preset.levels)
    assert density_of(ratios) == pytest.approx(max(density, 1 / min(block_n, 128)), abs=2e-3)


@pytest.mark.parametrize("target", [{"target_error": 0.25}, {"target_error": 0.15}, {"target_density": 0.5}])
@one_of_each
def test_the_target_is_met_and_the_preset_can_be_used(name, target, tmp_path):
    pipe = sharp(name)
    result = run(name, tmp_path, pipe, **target)
    kind = "error" if "target_error" in target else "density"
    asked = next(iter(target.values()))
    assert 0.8 * asked <= getattr(result, f"predicted_{kind}") <= asked
    assert getattr(result, f"measured_{kind}") == pytest.approx(asked, rel=0.2), "on a prompt that was kept apart"
    assert all(0 < density <= 1 for layers in result.densities for density in layers)
    assert "held-out" in result.summary()

    enable_psa(pipe, result.name, config=result.path, report=True)
    CASES[name].run(pipe, steps=5, grid=GRID)
    records = psa_report(pipe).records
    sparse = [record["density"] for record in records if record["step"] >= 1]
    assert sum(sparse) / len(sparse) == pytest.approx(result.predicted_density, abs=0.03)
    assert all(record["kind"] == "dense" for record in records if record["step"] == 0), "warm-up stays"


def test_less_error_costs_more_density(tmp_path):
    fine, coarse = (run("cogvideox", tmp_path, target_error=target) for target in (0.1, 0.3))
    assert fine.predicted_density > coarse.predicted_density
    assert fine.measured_error < coarse.measured_error


def test_the_file_holds_one_preset_and_what_was_found(tmp_path):
    result = run("wan2.1", tmp_path, target_error=0.2, name="mine")
    text = result.path.read_text()
    assert "# target error 0.2" in text
    content = yaml.safe_load(text)
    assert list(content) == ["Wan2.1_1.3b"]
    assert list(content["Wan2.1_1.3b"]["attention_configs"]) == ["mine"]
    preset = load_preset("Wan2.1_1.3b", "mine", config=result.path)
    assert (preset.importance, preset.warmup_steps, preset.block_n) == ("pooled_moments", 1, 16)
    for part, layers in enumerate(result.densities):
        for layer, density in enumerate(layers):
            here = preset.at(1 + part, 5, layer, 2)
            nominal = 1.0 if here.type == "dense" else density_of(here.to_dict()["mask_ratios"])
            assert nominal == pytest.approx(density, abs=0.08)  # whole blocks


def test_what_was_measured_is_not_measured_again(tmp_path):
    pipe = sharp("cogvideox")
    runs = count_runs(pipe)
    first = run("cogvideox", tmp_path, pipe, target_error=0.2)
    assert runs == PROMPTS
    runs.clear()
    second = run("cogvideox", tmp_path, pipe, target_error=0.2)
    assert runs == PROMPTS[2:], "the held-out prompt alone"
    assert second == first
    runs.clear()
    run("cogvideox", tmp_path, pipe, target_density=0.6, held_out=[], prompts=PROMPTS[:2])
    assert runs == []
    run("cogvideox", tmp_path, pipe, target_density=0.6, held_out=[], prompts=PROMPTS[:2], seed=7)
    assert runs == PROMPTS[:2], "another seed is another measurement"
    runs.clear()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn1.to_q.weight.mul_(1.5)
    run("cogvideox", tmp_path, pipe, target_density=0.6, held_out=[], prompts=PROMPTS[:2], seed=7)
    assert runs == PROMPTS[:2], "and so are other weights"


def test_an_interrupted_calibration_goes_on(tmp_path):
    whole = run("wan2.1", tmp_path / "whole", target_error=0.2)
    pipe = sharp("wan2.1")
    runs = count_runs(pipe)

    def stop(pipe, step, timestep, kwargs):
        if len(runs) == 2 and step == 2:
            raise Stop
        return kwargs

    with pytest.raises(Stop):
        run("wan2.1", tmp_path, pipe, target_error=0.2, callback_on_step_end=stop)
    measured = next(tmp_path.glob("*.jsonl"))
    lines = measured.read_text().splitlines()
    assert sum("finished" in line for line in lines) == 1
    measured.write_text("\n".join(lines) + '\n{"prompt": 1, "st')  # and the machine went down while it wrote
    runs.clear()
    assert all(module._forward_pre_hooks == {} for module in pipe.transformer.modules())
    pipe2 = sharp("wan2.1")
    runs2 = count_runs(pipe2)
    # a callback is part of the call, so the key would differ: carry the measurements over
    header = json.loads((tmp_path / "whole" / "made.yaml.measured.jsonl").read_text().splitlines()[0])
    measured.write_text("\n".join([json.dumps(header), *lines[1:]]) + '\n{"prompt": 1, "st')
    again = run("wan2.1", tmp_path, pipe2, target_error=0.2)
    assert runs2 == PROMPTS[1:]
    assert again.predicted_error == pytest.approx(whole.predicted_error)
    assert again.densities == whole.densities


def test_the_pipeline_is_left_as_it_was(tmp_path):
    pipe = sharp("cogvideox")
    pipe.set_progress_bar_config(disable=True, desc="mine")
    before, state = CASES["cogvideox"].run(pipe), torch.random.get_rng_state()
    run("cogvideox", tmp_path, pipe, target_error=0.2)
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert type(pipe) is type(CASES["cogvideox"].build())
    assert all(module._forward_pre_hooks == {} for module in pipe.transformer.modules())
    assert torch.equal(CASES["cogvideox"].run(pipe), before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "target_error or target_density, not both"),
        ({"target_error": 0.1, "target_density": 0.1}, "not both"),
        ({"target_error": 0.0}, r"must lie in \(0, 1\]"),
        ({"target_error": 0.1, "prompts": "a cat"}, "a list of at least one prompt"),
        ({"target_error": 0.1, "preset": "baseline"}, "is dense"),
        ({"target_error": 0.1, "preset": BASE.replace(mask_mode="thresholdbound")}, "thresholdbound"),
        ({"target_density": 0.01}, "cannot be reached: the least of the ladder is"),
    ],
)
def test_what_cannot_be_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("cogvideox", tmp_path, **change)


def test_a_pipeline_with_psa_on_and_a_run_without_sparse_steps_are_refused(tmp_path):
    pipe = sharp("cogvideox")
    enable_psa(pipe, BASE)
    with pytest.raises(RuntimeError, match="disable_psa"):
        run("cogvideox", tmp_path, pipe, target_error=0.1)
    with pytest.raises(RuntimeError, match="nothing is sparse in a run of 5 steps"):
        run("cogvideox", tmp_path, target_error=0.1, preset=BASE.replace(warmup_steps=5))


def cells_at_random(rng, count):
    cells = []
    for layer in range(count):
        scale = float(torch.rand(1, generator=rng)) + 0.1
        error = sorted((scale * torch.rand(len(DENSITIES), generator=rng)).tolist(), reverse=True)
        cells.append(Cell(0, (0, 1 + layer % 2), 4, layer, (*error, 0.0), (*DENSITIES, 1.0)))
    return cells


@pytest.mark.parametrize("kind", ["error", "density"])
def test_the_choice_is_nearly_the_best_there_is(kind, rng):
    other = "density" if kind == "error" else "error"
    for _ in range(5):
        cells = cells_at_random(rng, 4)
        target = 0.15
        chosen = choose(cells, kind, target)
        assert mean(cells, chosen, kind) <= target + 1e-12
        every = itertools.product(range(len(DENSITIES) + 1), repeat=4)
        best = min(mean(cells, c, other) for c in every if mean(cells, c, kind) <= target)
        assert mean(cells, chosen, other) <= best + 0.05


def test_the_script_writes_the_preset_and_what_was_found(tmp_path):
    sharp("cogvideox").save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a cat walks\nrain\n")
    size = ("--width", 112, "--height", 96, "--num_frames", 9, "--num_inference_steps", 5)
    files = ("--path", tmp_path / "made.yaml", "--json", tmp_path / "found.jsonl")
    own = ("--preset", "psa_cover", "--parts", 2, "--prompt_file", tmp_path / "prompts.txt", *files)
    script = Path(__file__).resolve().parents[2] / "scripts" / "calibrate.py"
    for target in (0.7, 0.8):
        args = ("--model", tmp_path / "pipe", *size, *own, "--target_density", target)
        done = subprocess.run(
            [sys.executable, str(script), *map(str, args)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert f"target density {target}" in done.stdout
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [line["target_density"] for line in found] == [0.7, 0.8]
    assert all(0 < line["predicted_density"] <= line["target_density"] for line in found)
    assert all(line["measured_density"] is not None for line in found), "the last prompt was held out"
    assert load_preset(found[-1]["section"], "calibrated", config=tmp_path / "made.yaml").type == "psa"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_error": None}, ValueError, "got neither; for example target_error=0.1"),
        ({"target_density": 0.1}, ValueError, "got both"),
        ({"target_error": "0.1"}, ValueError, r"target_error must lie in \(0, 1\], got '0.1'"),
        ({"target_error": float("nan")}, ValueError, "must lie in"),
        ({"target_error": True}, ValueError, "must lie in"),
        ({"prompts": ["a cat", 3]}, ValueError, r"prompts\[1\] must be a text"),
        ({"prompts": []}, ValueError, "prompts must be a list of at least one prompt, got 0"),
        ({"held_out": "two boats"}, ValueError, r"held_out must be a list of prompts, got one text: write \['two"),
        ({"held_out": [["a cat"]]}, ValueError, r"held_out\[0\] must be a text"),
        ({"parts": 0}, ValueError, "parts must be a whole number from 1, got 0"),
        ({"parts": 2.5}, ValueError, "parts must be a whole number"),
        ({"max_heads": -1}, ValueError, "max_heads must be a whole number"),
        ({"seed": "7"}, ValueError, "seed must be a whole number"),
        ({"name": " "}, ValueError, "name must be the name of a preset"),
        ({"path": "."}, IsADirectoryError, "is a folder: give the path of a file"),
        ({"prompt": "a cat"}, TypeError, "leave out prompt="),
        ({"num_inference_step": 4}, TypeError, "no argument 'num_inference_step'.*Did you mean 'num_inference_steps'"),
    ],
)
def test_a_slip_is_told_before_anything_runs_or_is_written(
    change, error, message, tmp_path, monkeypatch, pipe_that_ran
):
    monkeypatch.chdir(tmp_path)
    pipe, runs = pipe_that_ran
    with pytest.raises(error, match=message):
        run("wan2.1", tmp_path, pipe, **{"target_error": 0.2, **change})
    assert runs == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pipe_that_ran():
    """A pipeline, and the prompts that it was called with."""
    pipe = sharp("wan2.1")
    return pipe, count_runs(pipe)


def test_measurements_of_something_else_are_set_aside_and_named(tmp_path, caplog):
    pipe = sharp("wan2.1")
    runs = count_runs(pipe)
    measured = tmp_path / "made.yaml.measured.jsonl"
    whole = run("wan2.1", tmp_path, pipe, target_error=0.3, held_out=[], prompts=PROMPTS[:1])
    lines = measured.read_text().splitlines()
    runs.clear()
    # a line is lost, though every other one is as it was
    measured.write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    again = run("wan2.1", tmp_path, pipe, target_error=0.3, held_out=[], prompts=PROMPTS[:1])
    assert runs == PROMPTS[:1]
    assert again == whole
    assert measured.read_text().splitlines() == lines
    aside = tmp_path / "made.yaml.measured.old.jsonl"
    assert len(aside.read_text().splitlines()) == len(lines) - 1
    assert f"{measured} does not fit, line {len(lines) - 1}: calls of prompt 0 are missing" in caplog.text
    assert aside.name in caplog.text


def test_values_that_are_not_finite_are_no_measurement(tmp_path):
    pipe = sharp("wan2.1")
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_v.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"dense attention is not finite in step 1, layer \d of transformer; likely"):
        run("wan2.1", tmp_path, pipe, target_error=0.3)
    assert not (tmp_path / "made.yaml").exists()
    assert all(module._forward_pre_hooks == {} for module in pipe.transformer.modules())


def test_an_earlier_preset_stays_when_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "made.yaml"
    run("wan2.1", tmp_path, target_error=0.3, held_out=[], prompts=PROMPTS[:1], parts=1)
    before = path.read_bytes()
    with largest_file(200), pytest.raises(OSError, match="too large"):
        write_preset(path, "Wan2.1_1.3b", BASE.replace(name="other"), description="", comment="x" * 1000)
    assert path.read_bytes() == before
