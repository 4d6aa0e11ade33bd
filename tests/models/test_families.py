"""The battery that every family passes on small real pipelines.

A family gets it by a row in its file in tests/support/tiny_models.
"""

import re
from collections import Counter
from types import SimpleNamespace

import diffusers
import pytest
import torch
from forwards import assert_as_close, captured_inputs, error, forward, forward_in_float64
from guests import attentions, denoisers, enable
from tiny import ALL_CASES, OTHER_CASES, TINY_PRESET
from watch import expected_steps

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.presets import load_preset
from psa_diffusers.processors.standalone import PSAProcessor

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    # Mochi asks for an autocast that CPUs do not have; only numpy and older schedulers know why the other is said
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
each_case = pytest.mark.parametrize("name", ALL_CASES)


@pytest.fixture
def case(name):
    return (ALL_CASES | OTHER_CASES)[name]


@pytest.fixture
def pipe(case):
    return case.build()


def hooks(pipe):
    return [len(part._forward_pre_hooks) for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def prompts(case):
    """Prompts of different lengths, if the pipeline takes several."""
    if not case.several:
        return {"prompt": "a cat", "negative_prompt": "bad"}
    return {"prompt": ["a cat", "a brown dog"], "negative_prompt": ["bad", "worse"]}


@each_case
def test_disable_gives_back_the_same_objects_and_the_same_video(case, pipe):
    torch.manual_seed(5)
    before, generator = case.run(pipe, steps=2), torch.random.get_rng_state()
    found = [module.processor for _, module in attentions(pipe)]
    hooked, cls, state = hooks(pipe), type(pipe), dict(pipe.__dict__)

    assert enable(pipe) is pipe
    enabled = [module.processor for _, module in attentions(pipe)]
    with pytest.raises(ValueError, match="warmup_steps"):
        enable(pipe, warmup_steps=-3)
    assert enabled == [module.processor for _, module in attentions(pipe)], "a wrong change leaves everything as it was"
    torch.manual_seed(5)
    sparse = case.run(pipe, steps=2)
    assert torch.equal(torch.random.get_rng_state(), generator), "the global generator is where it would be without us"
    assert torch.equal(case.run(pipe, steps=2), sparse), "one seed, one video"
    assert not torch.equal(sparse, before)
    assert error(sparse, before) < 0.2

    assert disable_psa(pipe) is pipe
    assert all(module.processor is old for (_, module), old in zip(attentions(pipe), found, strict=True))
    assert (hooks(pipe), type(pipe), pipe.__dict__.keys()) == (hooked, cls, state.keys())
    assert torch.equal(case.run(pipe, steps=2), before)


@each_case
def test_only_video_self_attentions_change(case, pipe):
    before, keys = attentions(pipe), list(pipe.transformer.state_dict())
    modules = [path for path, _ in pipe.transformer.named_modules()]
    found = [module.processor for _, module in before]
    enable(pipe)
    changed = [module.processor is not old for (_, module), old in zip(before, found, strict=True)]
    assert changed == [bool(re.fullmatch(case.attentions, path)) for path, _ in before]
    assert sum(changed) == case.layers * len(denoisers(pipe))
    assert list(pipe.transformer.state_dict()) == keys
    assert [path for path, _ in pipe.transformer.named_modules()] == modules


@each_case
def test_all_factors_one_equals_dense_to_rounding_with_two_prompts_on_a_ragged_grid(name, case, pipe, monkeypatch):
    inputs = captured_inputs(pipe, name, steps=2, grid=case.ragged, **prompts(case))[0]
    dense = forward(pipe, inputs)
    enable(pipe, mask_ratios={1: [0, 1]}, report=True)
    sparse = forward(pipe, inputs)
    assert {record["kind"] for record in psa_report(pipe).records} == {"sparse"}
    disable_psa(pipe)
    if case.has_float64:
        assert_as_close(sparse, dense, forward_in_float64(pipe, inputs, monkeypatch))
    else:
        torch.testing.assert_close(sparse, dense)


@each_case
def test_warmup_steps_are_dense_and_all_others_sparse(case, pipe, watch):
    enable(pipe, warmup_steps=2)
    watch.denoisers(pipe, case.attentions)
    for steps, guidance in ((4, 3.0), (3, 3.0), (5, 1.0)):  # another number of steps than last time
        watch.clear()
        case.run(pipe, steps=steps, guidance=guidance)
        assert watch.steps() == expected_steps(steps, 2, case.layers * (case.passes if guidance > 1 else 1))


@each_case
def test_a_denoiser_called_without_its_pipeline_knows_the_step(name, case, pipe, watch):
    watch.denoisers(pipe, case.attentions)
    inputs = captured_inputs(pipe, name, steps=4)
    enable(pipe, warmup_steps=1)
    watch.clear()
    for arguments in inputs * 2:
        forward(pipe, arguments)
    steps = expected_steps(len(inputs) // case.passes, 1, case.layers * case.passes)
    assert watch.steps() == steps * 2


@each_case
def test_the_report_is_complete_with_several_prompts_on_a_ragged_grid(case, pipe):
    enable(pipe, report=True, warmup_steps=1)
    several = prompts(case)
    video = case.run(pipe, grid=case.ragged, steps=3, **several)
    assert torch.isfinite(video).all()
    records = psa_report(pipe).records
    counted = Counter((record["step"], record["layer"], record["kind"]) for record in records)
    layers = {path for path, _ in attentions(pipe) if re.fullmatch(case.attentions, path)}
    kinds = {0: "dense", 1: "sparse", 2: "sparse"}
    assert counted == {(step, layer, kinds[step]): case.passes for step in kinds for layer in layers}
    assert {record["reason"] for record in records} == {"warm-up", ""}
    assert {record["grid"] for record in records} == {case.ragged}
    assert all((0 < record["density"] < 1) == (record["kind"] == "sparse") for record in records)
    # the longest text of the samples that run in one batch
    texts = [[each] if isinstance(each, str) else each for each in several.values()]
    longest = {max(case.tokens(prompt, case.ragged) for prompt in text) for text in texts}
    longest = longest if case.passes > 1 else {max(longest)}
    assert {record["tokens"] for record in records if record["kind"] == "sparse"} == longest


@each_case
def test_set_attn_processor_of_the_denoiser_gives_the_same_bits(case, pipe):
    if not all(hasattr(denoiser, "set_attn_processor") for denoiser in denoisers(pipe)):
        pytest.skip(f"{type(pipe.transformer).__name__} has no set_attn_processor in diffusers {diffusers.__version__}")
    # as an object: without its pipeline, an expert of Wan 2.2 A14B looks like Wan 2.1 and gets other presets
    preset = load_preset("default", **{**TINY_PRESET, "warmup_steps": 1})
    enable_psa(pipe, preset)
    enabled = case.run(pipe, steps=3)
    disable_psa(pipe)
    processor = PSAProcessor(preset)
    for denoiser in denoisers(pipe):
        denoiser.set_attn_processor(processor)
    for _ in range(2):
        assert torch.equal(case.run(pipe, steps=3), enabled)


@pytest.mark.parametrize("name", OTHER_CASES)
def test_every_other_pipeline_runs_sparse_and_comes_back(name, case, pipe, monkeypatch):
    if name == "cosmos2.5-transfer":
        _resize_without_torchvision(monkeypatch)
    dense = case.run(pipe, steps=2)
    enable(pipe, mask_ratios={1: [0, 1]}, report=True)
    torch.testing.assert_close(case.run(pipe, steps=2), dense)
    records = psa_report(pipe).records
    assert {record["kind"] for record in records} == {"sparse"}
    assert (case.grid, case.tokens()) in {(record["grid"], record["tokens"]) for record in records}
    assert {record["layer"] for record in records} == {
        path for path, _ in attentions(pipe) if re.fullmatch(case.attentions, path)
    }
    disable_psa(pipe)
    enable(pipe)
    sparse = case.run(pipe, steps=2)
    assert torch.isfinite(sparse).all()
    assert not torch.equal(sparse, dense)
    disable_psa(pipe)
    assert torch.equal(case.run(pipe, steps=2), dense)


def _resize_without_torchvision(monkeypatch):
    """The control network of Cosmos resizes a mask with torchvision, which nothing else here needs."""
    from diffusers.models.controlnets import controlnet_cosmos

    functional = SimpleNamespace(resize=lambda x, size, interpolation: torch.nn.functional.interpolate(x, size))
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(controlnet_cosmos, "transforms", transforms, raising=False)
