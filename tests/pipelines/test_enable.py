"""The contract of a guest, on small real pipelines. What every family must pass is in tests/models/test_families.py."""

import functools
import gc
import inspect
import json
import logging
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import CogVideoXVideoToVideoPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from forwards import assert_as_close, captured_inputs, forward_in_float64
from guests import attentions, enable, one_of_each
from tiny import CASES
from watch import expected_steps

from psa_diffusers.models.registry import families, family_of, find_family, register_family
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.pipelines.state import state_of
from psa_diffusers.presets import PSAPreset

pytestmark = pytest.mark.usefixtures("no_gradients")
LAYERS = 2


def build(name):
    return CASES[name].build()


def calls_a_step(name, guidance=True):
    # CogVideoX runs both branches of guidance in one batch, Wan one after the other
    return LAYERS * (CASES[name].passes if guidance else 1)


def records(pipe):
    """What the report would be made of, densities still tensors."""
    return state_of(pipe).switch.run.recorder.entries


# what enabling changes, and that disabling undoes it


def test_disable_is_a_no_op_when_off():
    pipe = build("wan2.1")
    assert disable_psa(pipe) is pipe
    enable(pipe)
    disable_psa(pipe)
    assert disable_psa(pipe) is pipe


def test_the_class_of_an_enabled_pipeline_looks_like_the_original(tmp_path):
    pipe = build("wan2.1")
    cls, signature = type(pipe), inspect.signature(type(pipe).__call__)
    enable(pipe)
    assert isinstance(pipe, cls)
    assert (type(pipe).__name__, type(pipe).__qualname__, type(pipe).__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    assert inspect.signature(type(pipe).__call__) == signature
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "WanPipeline"


def test_a_pipeline_that_shares_an_enabled_denoiser_is_refused():
    pipe = enable(build("cogvideox"))
    other = CogVideoXVideoToVideoPipeline(**pipe.components)
    with pytest.raises(RuntimeError, match="another pipeline that shares it"):
        enable(other)
    disable_psa(pipe)
    enable(other)


def test_a_pipeline_made_from_an_enabled_one_works_and_runs_sparse(watch):
    pipe = enable(build("cogvideox"), warmup_steps=1)
    other = CogVideoXVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    watch.denoisers(other)
    CASES["cogvideox-v2v"].run(other)  # no pipeline call of ours: the timestep drives the clock
    assert watch.steps() == expected_steps(4, 1, LAYERS)
    again = type(pipe).from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    watch.clear()
    CASES["cogvideox"].run(again)
    assert watch.steps() == expected_steps(4, 1, LAYERS)


def test_an_unknown_pipeline_is_refused_with_the_list_of_families():
    pipe = DDPMPipeline(
        UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ),
        DDPMScheduler(),
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"UNet2DModel.*CogVideoXTransformer3DModel.*WanTransformer3DModel"):
        enable_psa(pipe)
    assert type(pipe) is DDPMPipeline


@pytest.mark.parametrize("thing", ["a name", None, 3])
def test_something_else_than_a_pipeline_is_refused(thing):
    with pytest.raises(TypeError, match="needs a diffusers pipeline"):
        enable_psa(thing)


def test_a_denoiser_alone_is_refused_with_the_way_to_do_it():
    with pytest.raises(TypeError, match="set_attn_processor"):
        enable_psa(tiny.wan_transformer())


@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        pytest.param({"preset": "psa_balancd"}, ValueError, "psa_balanced", id="unknown-preset"),
        pytest.param({"warmup_step": 1}, ValueError, "warmup_steps", id="unknown-key"),
        pytest.param({"mask_ratios": {1: [0, 0.4]}}, ValueError, "mask_ratios", id="gap"),
        pytest.param({"preset": 7}, TypeError, "preset must be a name", id="wrong-kind"),
        pytest.param({"config": "missing.yaml"}, FileNotFoundError, "missing.yaml", id="no-such-file"),
    ],
)
def test_a_wrong_choice_is_refused_and_changes_nothing(arguments, expected, message):
    pipe = build("wan2.1")
    before, cls = [attention.processor for _, attention in attentions(pipe)], type(pipe)
    with pytest.raises(expected, match=message):
        enable_psa(pipe, **arguments)
    assert [attention.processor for _, attention in attentions(pipe)] == before
    assert type(pipe) is cls
    assert not pipe.transformer._forward_pre_hooks


def test_enabling_from_a_callback_of_the_running_pipeline_is_refused():
    pipe = build("wan2.1")

    def callback(pipeline, index, timestep, kwargs):
        with pytest.raises(RuntimeError, match="the pipeline is running"):
            enable_psa(pipeline)
        return kwargs

    CASES["wan2.1"].run(pipe, callback_on_step_end=callback)


def test_disabling_from_a_callback_makes_the_rest_dense(watch):
    pipe = enable(build("wan2.1"))
    watch.denoisers(pipe)

    def callback(pipeline, index, timestep, kwargs):
        if index == 1:
            disable_psa(pipeline)
        return kwargs

    CASES["wan2.1"].run(pipe, callback_on_step_end=callback)
    assert [list(step) for step in watch.steps()] == [["sparse"], ["sparse"], ["dense"], ["dense"]]


def test_a_processor_set_since_survives_disable():
    pipe = enable(build("wan2.1"))
    mine = type(pipe.transformer.blocks[0].attn2.processor)()
    pipe.transformer.blocks[0].attn1.set_processor(mine)
    disable_psa(pipe)
    assert pipe.transformer.blocks[0].attn1.processor is mine


def test_nothing_keeps_a_disabled_pipeline_alive():
    pipe = enable(build("wan2.1"))
    CASES["wan2.1"].run(pipe, steps=1)
    disable_psa(pipe)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


# what it computes


@one_of_each
def test_grids_that_divide_by_nothing_run_sparse(name, watch):
    pipe = enable(build(name), report=True)
    watch.denoisers(pipe)
    video = CASES[name].run(pipe, grid=(5, 9, 11), steps=2)
    assert torch.isfinite(video).all()
    assert watch.steps() == expected_steps(2, 0, calls_a_step(name))
    entry = records(pipe)[0]
    assert entry["grid"] == (5, 9, 11)
    assert entry["tokens"] == 5 * 9 * 11 + CASES[name].text


@one_of_each
def test_a_batch_slot_does_not_matter(name):
    pipe = build(name)
    inputs = captured_inputs(pipe, name, steps=1, guidance=1.0)[0]
    enable(pipe)
    alone = pipe.transformer(**inputs)[0]
    twice = {
        key: torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.shape[:1] == (1,) else value
        for key, value in inputs.items()
    }
    both = pipe.transformer(**twice)[0]
    assert torch.equal(both[0], both[1])
    torch.testing.assert_close(both[:1], alone)


@one_of_each
def test_several_prompts_run_sparse(name, watch):
    pipe = enable(build(name))
    watch.denoisers(pipe)
    video = CASES[name].run(pipe, prompt=["a cat", "a dog"], negative_prompt=["bad", "worse"], num_videos_per_prompt=2)
    assert video.shape[0] == (2 if name == "cogvideox" else 4)  # CogVideoX ignores num_videos_per_prompt
    assert watch.steps() == expected_steps(4, 0, calls_a_step(name))


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox1.5", "wan2.1"])
def test_fused_projections_give_the_same_to_rounding(name, watch, monkeypatch):
    pipe = build(name)
    inputs = captured_inputs(pipe, name, steps=1)[0]
    enable(pipe)
    apart = pipe.transformer(**inputs)[0]
    truth = forward_in_float64(pipe, inputs, monkeypatch)
    disable_psa(pipe)
    pipe.transformer.fuse_qkv_projections()
    enable(pipe)
    assert_as_close(pipe.transformer(**inputs)[0], apart, truth)
    watch.denoisers(pipe)
    watch.clear()
    CASES[name].run(pipe)
    assert watch.steps() == expected_steps(4, 0, calls_a_step(name))


def test_fusing_projections_while_enabled_stays_sparse(watch):
    pipe = build("cogvideox")
    watch.denoisers(pipe)
    dense = CASES["cogvideox"].run(pipe, steps=1)
    enable(pipe)
    watch.clear()
    for change in (pipe.transformer.fuse_qkv_projections, pipe.transformer.unfuse_qkv_projections) * 2:
        change()  # diffusers sets processors of its own
        CASES["cogvideox"].run(pipe, steps=1)
    assert watch.steps() == [Counter(sparse=4 * LAYERS)]
    pipe.transformer.fuse_qkv_projections()
    disable_psa(pipe)
    assert torch.equal(CASES["cogvideox"].run(pipe, steps=1), dense)
    pipe.transformer.unfuse_qkv_projections()  # brings our processors back: they only forward now
    assert torch.equal(CASES["cogvideox"].run(pipe, steps=1), dense)


def test_processors_replaced_while_enabled_are_noticed(caplog):
    pipe = enable(build("cogvideox"))
    attention = pipe.transformer.transformer_blocks[0].attn1
    attention.set_processor(type(attention.processor.original)())
    CASES["cogvideox"].run(pipe, steps=1)
    assert "1 PSA processors have been replaced" in caplog.text


@one_of_each
def test_half_precision_runs_sparse(name, watch):
    pipe = build(name).to(torch.bfloat16)
    watch.denoisers(pipe)
    dense = CASES[name].run(pipe)
    enable(pipe)
    watch.clear()
    video = CASES[name].run(pipe)
    assert video.dtype == dense.dtype
    assert torch.isfinite(video).all()
    assert watch.steps() == expected_steps(4, 0, calls_a_step(name))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # upstream's norms under autocast
@one_of_each
def test_autocast_runs_sparse(name, watch):
    pipe = enable(build(name))
    watch.denoisers(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        video = CASES[name].run(pipe)
    assert torch.isfinite(video).all()
    assert watch.steps() == expected_steps(4, 0, calls_a_step(name))


# which steps are dense


@one_of_each
def test_the_last_steps_can_be_dense_too(name, watch):
    pipe = enable(build(name), warmup_steps=1, dense_last_steps=2)
    watch.denoisers(pipe)
    for steps in (5, 4, 2):
        watch.clear()
        CASES[name].run(pipe, steps=steps)
        assert watch.steps() == expected_steps(steps, 1, calls_a_step(name), dense_last=2)


def test_strength_shortens_the_run_not_the_warmup(watch):
    pipe = enable(build("cogvideox-v2v"), warmup_steps=1)
    watch.denoisers(pipe)
    CASES["cogvideox-v2v"].run(pipe, steps=6, strength=0.5)
    assert watch.steps() == expected_steps(3, 1, LAYERS)


def test_the_second_expert_has_no_warmup_of_its_own(watch):
    pipe = enable(build("wan2.2-a14b"), warmup_steps=1, report=True)
    CASES["wan2.2-a14b"].run(pipe)
    entries = records(pipe)
    assert {entry["denoiser"] for entry in entries} == {"transformer", "transformer_2"}
    assert {(entry["step"], entry["kind"]) for entry in entries} == {
        (0, "dense"),
        *((step, "sparse") for step in (1, 2, 3)),
    }


class Recording(PipelineCallback):
    tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, log):
        super().__init__()
        self.log = log

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.log.append((step_index, float(timestep), sorted(callback_kwargs)))
        return callback_kwargs


def recording_callback(kind, log):
    if kind == "function":

        def callback(pipeline, step_index, timestep, callback_kwargs):
            log.append((step_index, float(timestep), sorted(callback_kwargs)))
            return callback_kwargs

        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    callback = Recording(log)
    return {"callback_on_step_end": MultiPipelineCallbacks([callback]) if kind == "several" else callback}


@one_of_each
@pytest.mark.parametrize("kind", ["function", "object", "several"])
def test_a_user_callback_is_called_as_without_us(name, kind, watch):
    pipe = build(name)
    alone, beside = [], []
    CASES[name].run(pipe, **recording_callback(kind, alone))
    enable(pipe, warmup_steps=1)
    watch.denoisers(pipe)
    watch.clear()
    CASES[name].run(pipe, **recording_callback(kind, beside))
    assert beside == alone
    assert len(beside) == 4
    assert watch.steps() == expected_steps(4, 1, calls_a_step(name))


def test_a_callback_may_change_the_latents():
    pipe = build("wan2.1")
    latents = []

    def callback(pipeline, step_index, timestep, callback_kwargs):
        latents.append(callback_kwargs["latents"])
        return {"latents": callback_kwargs["latents"] * 0.5}

    CASES["wan2.1"].run(pipe, callback_on_step_end=callback)
    enable(pipe, warmup_steps=3)
    video = CASES["wan2.1"].run(pipe, callback_on_step_end=callback)
    dense, sparse = latents[:4], latents[4:]
    # dense steps are dense to the bit, if each begins with what the callback made of the one before
    assert all(torch.equal(*pair) for pair in zip(dense[:3], sparse[:3], strict=True))
    assert not torch.equal(dense[3], sparse[3])
    assert torch.equal(video, sparse[3] * 0.5)


def test_a_callback_given_by_position_is_found(watch):
    pipe = build("wan2.1")
    log = []
    inputs = CASES["wan2.1"].inputs() | recording_callback("function", log)
    names = list(inspect.signature(pipe.__call__).parameters)
    defaults = {key: value.default for key, value in inspect.signature(pipe.__call__).parameters.items()}
    enable(pipe, warmup_steps=1)
    watch.denoisers(pipe)
    pipe(*[inputs.get(key, defaults[key]) for key in names])
    assert [index for index, _, _ in log] == [0, 1, 2, 3]
    assert watch.steps() == expected_steps(4, 1, 4)


@one_of_each
def test_after_a_call_that_raised_the_warmup_is_right(name, watch):
    pipe = enable(build(name), warmup_steps=2)
    watch.denoisers(pipe)

    def callback(pipeline, index, timestep, kwargs):
        if index == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        CASES[name].run(pipe, callback_on_step_end=callback)
    watch.clear()
    CASES[name].run(pipe)
    assert watch.steps() == expected_steps(4, 2, calls_a_step(name))


def test_wrong_arguments_get_the_pipelines_own_error_and_do_no_harm(watch):
    pipe = enable(build("wan2.1"), warmup_steps=1)
    watch.denoisers(pipe)
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"):
        pipe(promt="a cat")
    CASES["wan2.1"].run(pipe)
    assert watch.steps() == expected_steps(4, 1, calls_a_step("wan2.1"))


@one_of_each
def test_after_an_interrupted_call_the_warmup_is_right(name, watch):
    pipe = enable(build(name), warmup_steps=2)
    watch.denoisers(pipe)

    def callback(pipeline, index, timestep, kwargs):
        pipeline._interrupt = index == 2
        return kwargs

    CASES[name].run(pipe, callback_on_step_end=callback, steps=6)
    assert watch.steps() == expected_steps(6, 2, calls_a_step(name))[:3]
    watch.clear()
    CASES[name].run(pipe)
    assert watch.steps() == expected_steps(4, 2, calls_a_step(name))


def test_positional_arguments_of_the_denoiser_are_understood(watch):
    pipe = build("cogvideox")
    inputs = captured_inputs(pipe, "cogvideox", steps=2)
    enable(pipe, warmup_steps=1, report=True)
    for arguments in inputs:
        names = ("hidden_states", "encoder_hidden_states", "timestep")
        rest = {key: value for key, value in arguments.items() if key not in names}
        pipe.transformer(*(arguments[key] for key in names), **rest)
    entries = records(pipe)
    assert [(entry["step"], entry["kind"]) for entry in entries] == [(0, "dense")] * 2 + [(1, "sparse")] * 2


def test_the_timestep_is_not_read_while_the_pipeline_tells_the_step(monkeypatch):
    pipe = enable(build("wan2.1"), warmup_steps=1)
    monkeypatch.setattr(type(state_of(pipe).switch.run.clock), "observe", None)
    CASES["wan2.1"].run(pipe)


def test_a_pipeline_without_a_callback_parameter_is_driven_by_the_timestep(watch):
    pipe = build("wan2.1")
    cls = type(pipe)

    class NoCallback(cls):
        def __call__(self, steps):
            return cls.__call__(self, **CASES["wan2.1"].inputs(steps=steps))

    pipe.__class__ = NoCallback
    enable(pipe, warmup_steps=1, dense_last_steps=1)
    watch.denoisers(pipe)
    for steps in (4, 3):
        watch.clear()
        pipe(steps)
        assert watch.steps() == expected_steps(steps, 1, 4, dense_last=1)


def test_too_many_warmup_steps_warn_once_a_call(caplog):
    pipe = enable(build("wan2.1"), warmup_steps=4)
    for _ in range(2):
        caplog.clear()
        CASES["wan2.1"].run(pipe)
        assert caplog.text.count("nothing will be sparse") == 1
    caplog.clear()
    CASES["wan2.1"].run(pipe, steps=5)
    assert "nothing will be sparse" not in caplog.text


@one_of_each
def test_settings_by_layer_and_step_are_followed(name, watch):
    pipe = enable(
        build(name),
        dense_layers="0",
        steps={"-1": {"mask_ratios": {1: [0, 1]}}, "0": {"type": "dense"}},
        report=True,
    )
    watch.denoisers(pipe)
    CASES[name].run(pipe, steps=3)
    calls = calls_a_step(name)
    assert [dict(step) for step in watch.steps()] == [
        {"dense": calls},
        {"dense": calls // 2, "sparse": calls // 2},
        {"dense": calls // 2, "sparse": calls // 2},
    ]
    sparse = [entry for entry in records(pipe) if entry["kind"] == "sparse"]
    assert all(entry["layer"].startswith(("blocks.1.", "transformer_blocks.1.")) for entry in sparse)
    assert all((float(entry["density"]) == 1) == (entry["step"] == 2) for entry in sparse)
    assert {entry["reason"] for entry in records(pipe) if entry["kind"] == "dense"} == {"the preset is dense here"}


# what else can come between


@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offload_and_psa_get_along(order, watch):
    pipe = build("wan2.1")
    if order == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    enable(pipe, warmup_steps=1)
    if order == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    watch.denoisers(pipe)
    for _ in range(2):
        watch.clear()
        CASES["wan2.1"].run(pipe)
        assert watch.steps() == expected_steps(4, 1, 4)


def test_attention_backends_reach_the_original_processors():
    pipe = enable(build("wan2.1"))
    processor = pipe.transformer.blocks[0].attn1.processor
    processor._attention_backend = "native"
    assert processor.original._attention_backend == "native"
    disable_psa(pipe)
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == "native"
    pipe = enable(build("cogvideox"))
    assert not hasattr(pipe.transformer.transformer_blocks[0].attn1.processor, "_attention_backend")


def test_a_dense_preset_changes_no_bit(watch):
    pipe = build("cogvideox")
    dense = CASES["cogvideox"].run(pipe)
    enable_psa(pipe, "baseline", report=True)
    assert torch.equal(CASES["cogvideox"].run(pipe), dense)
    assert {entry["reason"] for entry in records(pipe)} == {"the preset is dense"}


def self_attention_of(pipe, name):
    return pipe.transformer.transformer_blocks[0].attn1 if "cog" in name else pipe.transformer.blocks[0].attn1


@one_of_each
def test_an_attention_mask_makes_the_call_dense_and_says_so(name, caplog):
    pipe = build(name)
    inputs = captured_inputs(pipe, name, steps=1, guidance=1.0)[0]
    attention = self_attention_of(pipe, name)
    tokens = 126 + CASES[name].text
    mask = torch.zeros(1, 1, tokens) if "cog" in name else torch.zeros(1, 1, 1, tokens)
    forward = type(attention).forward

    def masked(self, *args, **kwargs):
        bound = inspect.signature(forward).bind(self, *args, **kwargs)
        extra = bound.arguments.pop("cross_attention_kwargs", {})
        bound.arguments["attention_mask"] = mask
        return forward(*bound.args, **bound.kwargs, **extra)

    enable(pipe, report=True)
    attention.forward = functools.partial(masked, attention)
    for _ in range(2):
        pipe.transformer(**inputs)
    reasons = [entry["reason"] for entry in records(pipe)]
    assert reasons[0] == "an attention mask is in use"
    assert reasons[1] == ""
    assert caplog.text.count("an attention mask is in use") == 1


@one_of_each
def test_tokens_that_do_not_fill_the_grid_make_the_call_dense(name, caplog):
    pipe = enable(build(name), report=True)
    run = state_of(pipe).switch.run
    processor = self_attention_of(pipe, name).processor
    original, seen = processor.original, []
    processor.original = lambda *args, **kwargs: seen.append(args) or original(*args, **kwargs)
    processor.site.grid, processor.site.sizes, processor.site.is_running = (3, 6, 7), torch.tensor((3, 6, 7)), True
    attention = self_attention_of(pipe, name)
    video, text = torch.ones(1, 100, 32), torch.ones(1, 4, 32)
    attention(video, text) if "cog" in name else attention(video)
    assert len(seen) == 1
    assert run.recorder.entries[0]["reason"] == "100 video tokens do not fill the grid 3 x 6 x 7"
    assert "100 video tokens do not fill the grid" in caplog.text


@pytest.mark.parametrize(
    ("head_dim", "reason"), [(8, "head dimension"), (12, "head dimension"), (24, "")], ids=["8", "12", "24"]
)
def test_head_dimensions_that_the_attention_cannot_take_run_dense(head_dim, reason):
    pipe = CASES["wan2.1"].build(head_dim=head_dim)
    dense = CASES["wan2.1"].run(pipe)
    enable(pipe, report=True)
    video = CASES["wan2.1"].run(pipe)
    assert torch.equal(video, dense) is bool(reason)
    assert all(reason in entry["reason"] for entry in records(pipe))


def test_float64_runs_dense():
    pipe = build("wan2.1").to(torch.float64)
    enable(pipe, report=True)
    CASES["wan2.1"].run(pipe, steps=1)
    assert {entry["reason"] for entry in records(pipe)} == {"the dtype torch.float64 is not supported"}


def test_a_processor_with_weights_is_left_alone(caplog):
    class Trained(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    pipe = build("wan2.1")
    attention = pipe.transformer.blocks[0].attn1
    attention.set_processor(Trained(attention.processor))
    keys = list(pipe.transformer.state_dict())
    enable(pipe)
    assert list(pipe.transformer.state_dict()) == keys
    assert "PSA leaves blocks.0.attn1 dense: its processor Trained has weights" in caplog.text


# compiled denoisers


@pytest.mark.parametrize("name", ["cogvideox", "wan2.1"])
@pytest.mark.parametrize("when", ["before", "after", "in-place"])
def test_a_compiled_denoiser_stays_one_graph(name, when):
    torch._dynamo.reset()
    pipe = build(name)
    enable(pipe, warmup_steps=1)
    eager = CASES[name].run(pipe)
    disable_psa(pipe)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if when == "after":
        enable(pipe, warmup_steps=1)
    if when == "in-place":
        enable(pipe, warmup_steps=1)
        pipe.transformer.compile(fullgraph=True, backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    if when == "before":
        enable(pipe, warmup_steps=1)
    compiled = CASES[name].run(pipe)
    assert torch.equal(compiled, eager)
    assert len(graphs) == 2  # a dense one and a sparse one
    CASES[name].run(pipe, steps=5)
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_blocks_compiled_one_by_one_share_their_graphs():
    torch._dynamo.reset()
    pipe = enable(CASES["wan2.1"].build(layers=10), warmup_steps=1)
    eager = CASES["wan2.1"].run(pipe)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert torch.equal(CASES["wan2.1"].run(pipe), eager)
    assert len(graphs) == 2  # a dense one and a sparse one for all ten layers
    torch._dynamo.reset()


def test_a_compiled_denoiser_can_be_recorded():
    torch._dynamo.reset()
    pipe = enable(build("wan2.1"), warmup_steps=1, report=True)
    eager, entries = CASES["wan2.1"].run(pipe), psa_report(pipe).records
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.equal(CASES["wan2.1"].run(pipe), eager)
    assert psa_report(pipe).records == entries
    torch._dynamo.reset()


# presets and families


def config_of(**kwargs):
    return SimpleNamespace(config=SimpleNamespace(**{"attention_head_dim": 64, **kwargs}))


@pytest.mark.parametrize(
    ("family", "config", "pipe", "section"),
    [
        ("CogVideoX", {"num_attention_heads": 30, "num_layers": 30, "patch_size_t": None}, None, "CogVideo_2b"),
        ("CogVideoX", {"num_attention_heads": 48, "num_layers": 42, "patch_size_t": None}, None, "CogVideo_5b"),
        ("CogVideoX", {"num_attention_heads": 48, "num_layers": 42, "patch_size_t": 2}, None, "CogVideo1.5_5b"),
        ("CogVideoX", {"num_attention_heads": 4, "num_layers": 3, "patch_size_t": None}, None, "demo"),
        ("Wan", {"num_attention_heads": 4, "num_layers": 8, "in_channels": 8}, None, "demo"),
        ("Wan", {"num_attention_heads": 12, "num_layers": 30, "in_channels": 16}, None, "Wan2.1_1.3b"),
        ("Wan", {"num_attention_heads": 40, "num_layers": 40, "in_channels": 16}, None, "Wan2.1_14b"),
        (
            "Wan",
            {"num_attention_heads": 40, "num_layers": 40, "in_channels": 36, "image_dim": 1280},
            None,
            "Wan2.1_14b",
        ),
        ("Wan", {"num_attention_heads": 40, "num_layers": 40, "in_channels": 36}, None, "Wan2.2_A14B"),
        ("Wan", {"num_attention_heads": 24, "num_layers": 30, "in_channels": 48}, None, "Wan2.2_5B"),
        (
            "Wan",
            {"num_attention_heads": 40, "num_layers": 40, "in_channels": 16},
            SimpleNamespace(transformer_2=object()),
            "Wan2.2_A14B",
        ),
        (
            "Wan",
            {"num_attention_heads": 40, "num_layers": 40, "in_channels": 16},
            SimpleNamespace(transformer_2=None, config=SimpleNamespace(boundary_ratio=0.9)),
            "Wan2.2_A14B",
        ),
    ],
)
def test_the_section_follows_from_the_denoisers_config(family, config, pipe, section):
    row = {each.name: each for each in families()}[family]
    assert row.section_of(config_of(**{"image_dim": None, **config}), pipe) == (section, True)


def test_a_size_without_a_section_gets_the_nearest_and_the_report_says_so():
    row = {each.name: each for each in families()}["CogVideoX"]
    denoiser = config_of(num_attention_heads=40, num_layers=40, patch_size_t=None)
    assert row.section_of(denoiser) == ("CogVideo_5b", False)
    pipe = enable(build("wan2.2-5b"), report=True)
    title = state_of(pipe).switch.run.recorder.title
    assert "section Wan2.2_5B, the nearest one: no section was made for 2 heads" in title


def test_enabling_logs_one_line(caplog):
    with caplog.at_level(logging.INFO, "psa_diffusers"):
        enable_psa(build("cogvideox"), warmup_steps=3)
    (record,) = [record for record in caplog.records if record.levelno == logging.INFO]
    assert record.message == (
        "PSA preset 'psa_cover' of section demo, in 2 self-attentions of transformer, 3 warm-up steps"
    )


def test_a_preset_object_needs_no_section():
    preset = PSAPreset(name="mine", mask_ratios={1: [0, 1]})
    pipe = enable_psa(build("wan2.1"), preset, warmup_steps=2)
    assert state_of(pipe).switch.run.preset == preset.replace(warmup_steps=2)


def test_a_users_own_yaml_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("Wan2.1_1.3b:\n  attention_configs:\n    mine:\n      type: psa\n      warmup_steps: 3\n")
    pipe = enable_psa(build("wan2.1"), "mine", config=path)
    assert state_of(pipe).switch.run.preset.warmup_steps == 3


def test_a_family_is_found_by_class_name_through_subclasses_and_compilation():
    class Mine(type(tiny.wan_transformer())):
        pass

    denoiser = tiny.wan_transformer()
    denoiser.__class__ = Mine
    assert family_of(denoiser).name == "Wan"
    assert family_of(torch.compile(denoiser)).name == "Wan"
    assert find_family(object()) is None
    with pytest.raises(TypeError, match=r"does not know Linear.*CogVideoXTransformer3DModel \(CogVideoX\)"):
        family_of(torch.nn.Linear(1, 1))


def test_a_denoiser_belongs_to_one_family():
    with pytest.raises(ValueError, match="WanTransformer3DModel already belongs to the family 'Wan'"):
        register_family(family_of(tiny.wan_transformer()))
