"""The battery that every family passes on small real pipelines, and what is written down about families.

A family gets it by a row in its file in tests/support/tiny_models.
"""

import hashlib
import importlib
import inspect
import re
from collections import Counter
from types import SimpleNamespace

import diffusers
import pytest
import torch
from forwards import assert_as_close, captured_inputs, error, forward, forward_in_float64
from tiny import ALL_CASES, MISSING, OTHER_CASES, TINY_PRESET
from watch import Watch, expected_steps, find_class, mirrored

from psa_diffusers.models.registry import CANNOT_GAIN, families
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.presets import load_preset, load_section
from psa_diffusers.processors.standalone import PSAProcessor
from scripts.docs.families import PAGE, page

pytestmark = [
    # Mochi asks for an autocast that CPUs do not have; only numpy and older schedulers know why the other is said
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
IS_NEWEST = diffusers.__version__.startswith("0.42.")
"""Whether this is the newest diffusers that pyproject.toml allows; older ones have fewer families."""
each_case = pytest.mark.parametrize("name", ALL_CASES)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def enable(pipe, **kwargs):
    return enable_psa(pipe, **{**TINY_PRESET, **kwargs})


def denoisers(pipe):
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]


def attentions(pipe):
    """Path and module of everything in the denoisers that has an attention processor."""
    return [
        (path, module)
        for part in denoisers(pipe)
        for path, module in part.named_modules()
        if hasattr(module, "processor")
    ]


def hooks(pipe):
    return [len(part._forward_pre_hooks) for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


# the battery


@each_case
def test_disable_gives_back_the_same_objects_and_the_same_video(name):
    case, pipe = ALL_CASES[name], ALL_CASES[name].build()
    torch.manual_seed(5)
    before, generator = case.run(pipe), torch.random.get_rng_state()
    found = [module.processor for _, module in attentions(pipe)]
    hooked, cls, state = hooks(pipe), type(pipe), dict(pipe.__dict__)

    assert enable(pipe) is pipe
    enabled = [module.processor for _, module in attentions(pipe)]
    with pytest.raises(RuntimeError, match=r"already enabled on this pipeline; call disable_psa\(pipe\)"):
        enable(pipe, warmup_steps=3)
    assert enabled == [module.processor for _, module in attentions(pipe)]
    torch.manual_seed(5)
    sparse = case.run(pipe)
    assert torch.equal(torch.random.get_rng_state(), generator), "the global generator is where it would be without us"
    assert torch.equal(case.run(pipe), sparse), "one seed, one video"
    assert not torch.equal(sparse, before)
    assert error(sparse, before) < 0.2

    assert disable_psa(pipe) is pipe
    assert all(module.processor is old for (_, module), old in zip(attentions(pipe), found, strict=True))
    assert (hooks(pipe), type(pipe), pipe.__dict__.keys()) == (hooked, cls, state.keys())
    assert torch.equal(case.run(pipe), before)


@each_case
def test_only_video_self_attentions_change(name):
    case, pipe = ALL_CASES[name], ALL_CASES[name].build()
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
def test_all_factors_one_equals_dense_to_rounding_with_two_prompts_on_a_ragged_grid(name, monkeypatch):
    case, pipe = ALL_CASES[name], ALL_CASES[name].build()
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
def test_warmup_steps_are_dense_and_all_others_sparse(name, watch):
    case, pipe = ALL_CASES[name], enable(ALL_CASES[name].build(), warmup_steps=2)
    watch.denoisers(pipe, case.attentions)
    for steps, guidance in ((4, 3.0), (3, 3.0), (5, 1.0)):  # another number of steps than last time
        watch.clear()
        case.run(pipe, steps=steps, guidance=guidance)
        assert watch.steps() == expected_steps(steps, 2, case.layers * (case.passes if guidance > 1 else 1))


@each_case
def test_a_denoiser_called_without_its_pipeline_knows_the_step(name, watch):
    case, pipe = ALL_CASES[name], ALL_CASES[name].build()
    watch.denoisers(pipe, case.attentions)
    inputs = captured_inputs(pipe, name, steps=4)
    enable(pipe, warmup_steps=1)
    watch.clear()
    for arguments in inputs * 2:
        forward(pipe, arguments)
    steps = expected_steps(len(inputs) // case.passes, 1, case.layers * case.passes)
    assert watch.steps() == steps * 2


@each_case
def test_the_report_is_complete_with_several_prompts_on_a_ragged_grid(name):
    case, pipe = ALL_CASES[name], enable(ALL_CASES[name].build(), report=True, warmup_steps=1)
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


def prompts(case):
    """Prompts of different lengths, if the pipeline takes several."""
    if not case.several:
        return {"prompt": "a cat", "negative_prompt": "bad"}
    return {"prompt": ["a cat", "a brown dog"], "negative_prompt": ["bad", "worse"]}


@each_case
def test_set_attn_processor_of_the_denoiser_gives_the_same_bits(name):
    case, pipe = ALL_CASES[name], ALL_CASES[name].build()
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
def test_every_other_pipeline_runs_sparse_and_comes_back(name, monkeypatch):
    if name == "cosmos2.5-transfer":
        _resize_without_torchvision(monkeypatch)
    case, pipe = OTHER_CASES[name], OTHER_CASES[name].build()
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


# what only some families do


def run(name, **kwargs):
    """The records of one call."""
    needs(name, "diffusers")
    pipe = enable(ALL_CASES[name].build(), report=True)
    ALL_CASES[name].run(pipe, **kwargs)
    return psa_report(pipe).records


def test_a_block_causal_mask_makes_skyreels_dense_and_says_so():
    records = run("skyreels-forcing", steps=2, grid=(4, 6, 7), ar_step=1, causal_block_size=2)
    assert {(record["kind"], record["reason"]) for record in records} == {("dense", "an attention mask is in use")}


def test_chronoedit_follows_the_grid_when_it_stops_reasoning():
    records = run("chronoedit", steps=3, num_temporal_reasoning_steps=2)
    assert {(record["step"], record["grid"]) for record in records} == {(0, (3, 6, 7)), (1, (3, 6, 7)), (2, (2, 6, 7))}
    assert {record["kind"] for record in records} == {"sparse"}


@pytest.mark.parametrize(
    ("name", "segments"),
    [
        ("wan-animate", {"segment_frame_length": 5, "grid": (4, 6, 7)}),
        ("skyreels-forcing", {"base_num_frames": 9, "overlap_history": 5, "grid": (5, 6, 7)}),
    ],
)
def test_every_segment_of_a_long_video_warms_up(name, segments, watch):
    needs(name, "diffusers")
    case, pipe = ALL_CASES[name], enable(ALL_CASES[name].build(), warmup_steps=1)
    watch.denoisers(pipe, case.attentions)
    case.run(pipe, steps=3, **segments)
    steps = watch.steps()
    assert len(steps) % 3 == 0
    assert len(steps) > 3
    assert steps == expected_steps(3, 1, case.layers * case.passes) * (len(steps) // 3)


PADDED = [name for name, case in ALL_CASES.items() if case.padded is not None and case.several]


@pytest.mark.parametrize("name", PADDED)
def test_a_batch_of_texts_of_different_lengths_gives_what_each_gives_alone(name):
    pipe = enable(ALL_CASES[name].build())
    inputs = captured_inputs(pipe, name, steps=2, prompt=["a cat", "a brown dog"], negative_prompt=["bad", "worse"])[0]
    batch = len(inputs["timestep"])
    together = forward(pipe, inputs)
    for sample in range(batch):
        alone = {key: take(value, sample, batch) for key, value in inputs.items()}
        torch.testing.assert_close(forward(pipe, alone), together[sample : sample + 1])


def take(value, sample, batch):
    """One sample of an input."""
    is_batch = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == batch
    return value[sample : sample + 1] if is_batch else value


@pytest.mark.parametrize("name", PADDED)
def test_what_stands_in_the_padding_changes_no_bit(name):
    pipe = enable(ALL_CASES[name].build())
    inputs = captured_inputs(pipe, name, steps=2)[0]
    mask = inputs["encoder_attention_mask"].bool()
    video = forward(pipe, inputs)
    text = torch.where(mask[..., None], inputs["encoder_hidden_states"], 7.0)
    assert torch.equal(forward(pipe, {**inputs, "encoder_hidden_states": text}), video)
    assert not mask.all(), "there is padding to change"


def test_padding_before_the_text_is_dense_and_says_so():
    pipe = enable(ALL_CASES["mochi"].build(), report=True)
    inputs = captured_inputs(pipe, "mochi", steps=2)[0]
    forward(pipe, {**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"].flip(1)})
    assert psa_report(pipe).records[-1]["reason"] == "the padding of the text is not at its end"


def test_a_batch_that_was_changed_on_the_way_is_dense_and_says_so():
    pipe = enable(ALL_CASES["hunyuan-video"].build())
    inputs = captured_inputs(pipe, "hunyuan-video", steps=1)[0]
    forward(pipe, inputs)  # of one sample
    attention = pipe.transformer.transformer_blocks[0].attn
    reason = attention.processor.why_dense(attention, torch.ones(2, 3 * 6 * 7, 32), None)
    assert reason == "something between the denoiser and its layers has changed the batch"


def test_texts_of_any_length_share_a_graph_of_a_compiled_denoiser():
    torch._dynamo.reset()
    pipe = enable(ALL_CASES["hunyuan-video"].build())
    prompts = ("a cat", "a brown dog", "a fox in the snow")
    inputs = [captured_inputs(pipe, "hunyuan-video", steps=1, prompt=prompt)[0] for prompt in prompts]
    eager = [forward(pipe, arguments) for arguments in inputs]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.transformer.compile(fullgraph=True, backend=backend)
    assert torch.equal(forward(pipe, inputs[0]), eager[0])
    compiled = len(graphs)
    assert all(torch.equal(forward(pipe, each), video) for each, video in zip(inputs, eager, strict=True))
    assert len(graphs) == compiled
    torch._dynamo.reset()


def test_hunyuan_video_15_makes_no_mask(monkeypatch):
    module = needs("hunyuan-video-1.5", "diffusers.models.transformers.transformer_hunyuan_video15")
    pipe = enable(ALL_CASES["hunyuan-video-1.5"].build())
    monkeypatch.setattr(module, "dispatch_attention_fn", None)  # upstream's way, which comes after the mask is made
    ALL_CASES["hunyuan-video-1.5"].run(pipe, steps=1)


def needs(name, module):
    if name not in ALL_CASES:
        pytest.skip(f"diffusers {diffusers.__version__} has no {MISSING[name].pipeline}")
    return importlib.import_module(module)


def test_the_decoder_of_motif_video_sees_both_versions_of_the_video():
    needs("motif-video", "diffusers")
    case, pipe = ALL_CASES["motif-video"], ALL_CASES["motif-video"].build(num_single_layers=2, num_decoder_layers=1)
    inputs = captured_inputs(pipe, "motif-video", steps=1)[0]
    dense = forward(pipe, inputs)
    enable(pipe, mask_ratios={1: [0, 1]}, report=True)
    torch.testing.assert_close(forward(pipe, inputs), dense)
    frames, height, width = case.grid
    decoder = {record["layer"]: record for record in psa_report(pipe).records}["single_transformer_blocks.1.attn"]
    assert decoder["kind"] == "sparse"
    assert decoder["grid"] == (2 * frames, height, width)
    assert decoder["tokens"] == 2 * frames * height * width


def test_ltx2_leaves_perturbed_layers_to_upstream():
    needs("ltx2.3-condition", "diffusers")
    case, pipe = ALL_CASES["ltx2.3-condition"], ALL_CASES["ltx2.3-condition"].build()
    guidance = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [1], "steps": 2}
    dense = case.run(pipe, **guidance)
    enable(pipe, report=True, mask_ratios={1: [0, 1]})
    torch.testing.assert_close(case.run(pipe, **guidance), dense)
    records = psa_report(pipe).records
    reasons = Counter((record["layer"], record["reason"]) for record in records)
    # both branches of guidance at once, one pass that perturbs layer 1, one without sound
    assert reasons == {
        ("transformer_blocks.0.attn1", ""): 6,
        ("transformer_blocks.1.attn1", ""): 4,
        ("transformer_blocks.1.attn1", "spatio-temporal guidance leaves attention out in this layer"): 2,
    }


def test_ltx2_with_a_mask_between_tokens_is_dense_and_says_so():
    needs("ltx2", "diffusers")
    pipe = enable(ALL_CASES["ltx2"].build(), report=True)
    if "video_self_attention_mask" not in inspect.signature(type(pipe.transformer).forward).parameters:
        pytest.skip(f"LTX-2 of diffusers {diffusers.__version__} takes no such mask")
    inputs = captured_inputs(pipe, "ltx2", steps=1)[0]
    tokens = inputs["hidden_states"].shape[1]
    forward(pipe, {**inputs, "video_self_attention_mask": torch.ones(2, tokens, tokens)})
    assert psa_report(pipe).records[-1]["reason"] == "an attention mask is in use"


def test_the_models_own_sparse_attention_stays(monkeypatch):
    module = needs("kandinsky5", "diffusers.models.transformers.transformer_kandinsky")
    pipe = enable(ALL_CASES["kandinsky5"].build(), report=True)
    inputs = captured_inputs(pipe, "kandinsky5", steps=1, grid=(2, 8, 8))[0]
    monkeypatch.setattr(module, "nablaT_v2", lambda *args, **kwargs: None)  # its mask needs a GPU
    sparse = {"to_fractal": True, "sta_mask": None, "P": 0.9}
    forward(pipe, {**inputs, "sparse_params": sparse})
    assert psa_report(pipe).records[-1]["reason"] == "the model's own block-sparse attention is in use"


# what is written down


def test_every_family_has_a_tiny_pipeline():
    without = {family.name for family in families()} - {case.family for case in (ALL_CASES | MISSING).values()}
    assert not without, f"add a tiny pipeline of {', '.join(sorted(without))} to tests/support/tiny_models"


def test_every_pipeline_that_is_listed_has_run():
    if not IS_NEWEST:
        pytest.skip(f"diffusers {diffusers.__version__} has not all of them")
    listed = {pipeline for family in families() for pipeline in family.pipelines}
    assert listed == {case.pipeline for case in (ALL_CASES | OTHER_CASES).values()}


def test_this_diffusers_has_every_pipeline():
    if MISSING:
        names = ", ".join(sorted({case.pipeline for case in MISSING.values()}))
        pytest.skip(f"diffusers {diffusers.__version__} has no {names}, or in another form")


def test_the_page_is_what_the_registry_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.docs.families"


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_denoisers_and_pipelines_of_a_family_exist(family):
    missing = [name for name in (*family.denoisers, *family.pipelines) if not hasattr(diffusers, name)]
    if missing and not IS_NEWEST:
        pytest.skip(f"diffusers {diffusers.__version__} has no {', '.join(missing)}")
    assert not missing


def test_denoisers_that_cannot_gain_are_refused_with_the_reason():
    latte = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    pipe = SimpleNamespace(components={"transformer": latte})
    with pytest.raises(TypeError, match="cannot make LatteTransformer3DModel faster: its attention is split"):
        enable_psa(pipe)
    if IS_NEWEST:
        assert not [name for name in CANNOT_GAIN if not hasattr(diffusers, name)]
    assert not [name for name in CANNOT_GAIN if name in {each for family in families() for each in family.denoisers}]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_section_of_a_family_exists(family):
    for rule in family.sections:
        assert load_section(rule.section).presets


@pytest.mark.parametrize("upstream", mirrored())
def test_upstream_processor_is_one_that_we_mirror(upstream):
    cls = find_class(upstream)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {upstream}")
    digest = hashlib.sha256(inspect.getsource(cls.__call__).encode()).hexdigest()[:12]
    assert digest in mirrored()[upstream], (
        f"{upstream}.__call__ is new in diffusers {diffusers.__version__} (digest {digest}). Compare it with the "
        "__call__ of our processor in psa_diffusers/models/: order of projection, norm and rotary embedding, fused "
        "projections, new arguments. Port what matters, then add the digest to UPSTREAM_DIGESTS."
    )
