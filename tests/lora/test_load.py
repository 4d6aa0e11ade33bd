"""`load_psa_lora`: real files, right and wrong ones."""

import inspect
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, WanPipeline, WanTransformer3DModel
from forwards import assert_as_close, captured_inputs, error, forward_in_float64
from lora_files import BLOCKS, lora_file, lora_weights
from safetensors.torch import save_file
from tiny import CASES, TINY_PRESET

from psa_diffusers.lora import check_lora, load_psa_lora, recipe_of, unload_psa_lora
from psa_diffusers.lora.recipes import REPOSITORY, choose_recipe
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.state import state_of

# peft announces a second adapter
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

CHOICE = {**TINY_PRESET, "warmup_steps": 1}
both = pytest.mark.parametrize("name", ["cogvideox", "wan2.1"])


@both
def test_before_and_after_enable_agree_bit_for_bit(name, tmp_path):
    path = lora_file(tmp_path, name)
    first, second = CASES[name].build(), CASES[name].build()
    assert load_psa_lora(first, path) is first
    enable_psa(first, **CHOICE)
    enable_psa(second, **CHOICE)
    plain = CASES[name].run(second)
    load_psa_lora(second, path)
    video = CASES[name].run(first)
    assert torch.equal(video, CASES[name].run(second))
    assert not torch.equal(video, plain)


@both
def test_it_is_what_diffusers_loads(name, tmp_path):
    path = lora_file(tmp_path, name)
    ours, theirs = CASES[name].build(), CASES[name].build()
    load_psa_lora(ours, path, scale=0.5)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="psa")
    theirs.set_adapters("psa", 0.5)
    assert torch.equal(CASES[name].run(ours), CASES[name].run(theirs))


@both
@torch.no_grad()
def test_fusing_gives_the_same_to_rounding_and_can_be_undone(name, tmp_path, monkeypatch):
    path = lora_file(tmp_path, name)
    pipe = CASES[name].build()
    inputs = captured_inputs(pipe, name, steps=1)[0]
    enable_psa(pipe, **{**CHOICE, "warmup_steps": 0})
    plain = pipe.transformer(**inputs)[0]
    load_psa_lora(pipe, path, scale=0.5, fuse=True)
    fused = pipe.transformer(**inputs)[0]
    pipe.unfuse_lora()
    loose = pipe.transformer(**inputs)[0]
    assert error(fused, plain) > 1e-2, "the LoRA must matter here"
    assert_as_close(fused, loose, forward_in_float64(pipe, inputs, monkeypatch))
    disable_psa(pipe)
    pipe.unload_lora_weights()


def test_a_folder_and_a_name_in_it_are_found(tmp_path):
    lora_file(tmp_path, "cogvideox").rename(tmp_path / "four_steps.safetensors")
    pipe = CASES["cogvideox"].build()
    load_psa_lora(pipe, tmp_path)
    load_psa_lora(pipe, str(tmp_path), weight_name="four_steps.safetensors", adapter_name="again")
    assert pipe.get_list_adapters() == {"transformer": ["psa", "again"]}
    assert pipe.get_active_adapters() == ["again"]


def test_of_several_files_the_usual_name_wins_and_else_one_must_be_named(tmp_path):
    path = lora_file(tmp_path, "cogvideox")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    load_psa_lora(CASES["cogvideox"].build(), tmp_path)
    path.rename(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"pass weight_name, one of lora\.safetensors, other\.safetensors"):
        load_psa_lora(CASES["cogvideox"].build(), tmp_path)


def test_the_older_layout_of_diffusers_is_read(tmp_path):
    new = lora_file(tmp_path, "cogvideox")
    first = load_psa_lora(CASES["cogvideox"].build(), new)
    old = lora_file(tmp_path, "cogvideox", halves=("lora.down.weight", "lora.up.weight"))
    second = load_psa_lora(CASES["cogvideox"].build(), old)
    assert torch.equal(CASES["cogvideox"].run(first), CASES["cogvideox"].run(second))


def test_of_two_experts_the_first_gets_it_unless_the_keys_say_otherwise(tmp_path):
    name = "wan2.2-a14b"
    pipe = load_psa_lora(CASES[name].build(), lora_file(tmp_path, name))
    assert pipe.get_list_adapters() == {"transformer": ["psa"]}
    weights = lora_weights(name) | lora_weights(name, prefix="transformer_2")
    save_file(weights, tmp_path / "both.safetensors")
    pipe = load_psa_lora(CASES[name].build(), tmp_path / "both.safetensors", scale=0.5, fuse=True)
    assert pipe.get_list_adapters() == {"transformer": ["psa"], "transformer_2": ["psa"]}
    for denoiser in (pipe.transformer, pipe.transformer_2):
        assert denoiser.blocks[0].attn1.to_q.merged


def test_a_lora_with_offload_keeps_psa(tmp_path):
    name = "wan2.1"
    pipe = enable_psa(CASES[name].build(), **CHOICE)
    load_psa_lora(pipe, lora_file(tmp_path, name))
    video = CASES[name].run(pipe)
    other = CASES[name].build()
    other.enable_model_cpu_offload(device="cpu")
    enable_psa(other, **CHOICE)
    other._offload_device = torch.device("cpu")
    other.remove_all_hooks()
    load_psa_lora(other, tmp_path)
    assert torch.equal(CASES[name].run(other), video)


# the LoRA for four steps


FOUR_STEPS = {
    "cogvideox": ("CogVideoXDPMScheduler", {"timestep_spacing": "trailing"}, "CogVideo_5b"),
    "wan2.1": ("UniPCMultistepScheduler", {"flow_shift": 3.0, "use_flow_sigmas": True}, "Wan2.1_1.3b"),
}


def snapshot(pipe):
    """All that a LoRA may change in a pipeline."""
    denoisers = [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]
    return {
        "class": type(pipe),
        "ours": {attribute for attribute in vars(pipe) if "psa" in attribute},
        "fused": set(pipe.fused_loras),
        "scheduler": pipe.scheduler,
        "config": dict(pipe.config),
        "signature": inspect.signature(pipe.__call__),
        "modules": [module for denoiser in denoisers for module in denoiser.modules()],
        "keys": [key for denoiser in denoisers for key in denoiser.state_dict()],
    }


def assert_same_state(pipe, before):
    after = snapshot(pipe)
    assert after.keys() == before.keys()
    for part, value in after.items():
        assert value == before[part], part


def run_without_settings(pipe, name):
    """A call that leaves steps and guidance to the pipeline."""
    inputs = CASES[name].inputs()
    del inputs["num_inference_steps"], inputs["guidance_scale"]
    steps = []
    inputs["callback_on_step_end"] = lambda pipe, step, timestep, kwargs: steps.append(int(timestep)) or kwargs
    return pipe(**inputs).frames, steps


@both
def test_the_lora_for_four_steps_brings_what_it_needs_and_takes_it_back(name, tmp_path):
    pipe = CASES[name].build()
    dense = CASES[name].run(pipe)
    before = snapshot(pipe)
    load_psa_lora(pipe, lora_file(tmp_path, name, rank=64))
    scheduler, settings, section = FOUR_STEPS[name]
    assert type(pipe.scheduler).__name__ == scheduler
    assert settings.items() <= dict(pipe.scheduler.config).items()
    parameters = inspect.signature(pipe.__call__).parameters
    assert (parameters["num_inference_steps"].default, parameters["guidance_scale"].default) == (4, 1.0)
    assert recipe_of(pipe).preset == (section, "psa_4steps")
    enable_psa(pipe)
    assert (state_of(pipe).switch.run.preset.model, state_of(pipe).switch.run.preset.name) == (section, "psa_4steps")
    disable_psa(pipe)

    forwards = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *args: forwards.append(1))
    _, steps = run_without_settings(pipe, name)
    assert len(steps) == len(forwards) == 4, "four steps, one forward each: no guidance"
    if name == "cogvideox":
        assert steps == [999, 749, 499, 249]  # trailing spacing of 1000
    forwards.clear()
    CASES[name].run(pipe, steps=2, guidance=3.0)
    assert len(forwards) == 2 * CASES[name].passes, "what the user passes wins"
    handle.remove()

    assert unload_psa_lora(pipe) is pipe
    assert_same_state(pipe, before)
    assert torch.equal(CASES[name].run(pipe), dense)


@pytest.mark.parametrize("unload", ["ours", "unload_lora_weights", "delete_adapters"])
@pytest.mark.parametrize("fuse", [False, True], ids=["loose", "fused"])
def test_every_way_to_unload_gives_everything_back(unload, fuse, tmp_path):
    pipe = CASES["cogvideox"].build()
    before = snapshot(pipe)
    weights = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    load_psa_lora(pipe, lora_file(tmp_path, "cogvideox", rank=64), fuse=fuse)
    if unload == "ours":
        unload_psa_lora(pipe)
    elif unload == "unload_lora_weights":
        pipe.unload_lora_weights()
    else:
        pipe.delete_adapters("psa")
        assert recipe_of(pipe) is None
        pipe.unload_lora_weights()  # diffusers leaves empty layers of peft behind
    assert_same_state(pipe, before)
    for key, value in pipe.transformer.state_dict().items():
        if fuse:  # adding and subtracting the LoRA rounds twice, at the size of the largest sum
            largest = float(value.abs().max()) + 64 * 4.0**2
            assert float((value - weights[key]).abs().max()) <= 2 * torch.finfo(value.dtype).eps * largest
        else:
            assert torch.equal(value, weights[key])


@both
@pytest.mark.parametrize("order", ["lora-first", "psa-first"])
@torch.no_grad()
def test_the_default_preset_is_the_loras_before_and_after_enable(name, order, tmp_path):
    path = lora_file(tmp_path, name, rank=64)
    pipe = CASES[name].build()
    before = snapshot(pipe)
    if order == "lora-first":
        load_psa_lora(pipe, path)
        enable_psa(pipe, report=True)
    else:
        enable_psa(pipe, report=True)
        assert state_of(pipe).switch.run.preset.name != "psa_4steps"
        load_psa_lora(pipe, path)
    switch = state_of(pipe).switch
    assert switch.run.preset.name == "psa_4steps"
    assert "which the LoRA was trained with" in switch.run.recorder.title
    _, steps = run_without_settings(pipe, name)
    assert len(steps) == 4
    kinds = [(entry["step"], entry["kind"]) for entry in switch.run.recorder.entries]
    assert kinds == [(step, "sparse") for step in range(4) for _ in range(2)], "sparse from the first step"
    pipe.unload_lora_weights()
    assert state_of(pipe).switch.run.preset.name != "psa_4steps"
    disable_psa(pipe)
    assert_same_state(pipe, before)


def test_a_preset_that_was_chosen_stays_and_the_log_says_so(tmp_path, caplog):
    pipe = enable_psa(CASES["wan2.1"].build(), "psa_topk")
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    load_psa_lora(pipe, lora_file(tmp_path, "wan2.1", rank=64))
    assert state_of(pipe).switch.run.preset.name == "psa_topk"
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    assert "PSA stays at the preset 'psa_topk', which was chosen; the LoRA was trained with 'psa_4steps'" in caplog.text
    unload_psa_lora(pipe)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors


@pytest.mark.parametrize("first_off", ["psa", "lora"])
def test_psa_and_the_lora_go_in_any_order(first_off, tmp_path):
    pipe = CASES["cogvideox"].build()
    before = snapshot(pipe)
    path = lora_file(tmp_path, "cogvideox", rank=64)
    for enable_first in (True, False):
        if enable_first:
            enable_psa(pipe, "psa_balanced")
        load_psa_lora(pipe, path)
        if not enable_first:
            enable_psa(pipe)
        for off in (disable_psa, unload_psa_lora) if first_off == "psa" else (unload_psa_lora, disable_psa):
            off(pipe)
        assert_same_state(pipe, before)


def test_a_scheduler_chosen_since_stays(tmp_path):
    pipe = load_psa_lora(CASES["cogvideox"].build(), lora_file(tmp_path, "cogvideox", rank=64))
    pipe.scheduler = mine = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="linspace")
    unload_psa_lora(pipe)
    assert pipe.scheduler is mine


@pytest.mark.parametrize(
    ("name", "kwargs", "few_steps", "is_one"),
    [
        pytest.param("cogvideox", {"rank": 64}, None, True, id="published-form"),
        pytest.param("cogvideox", {"rank": 64}, False, False, id="not-wanted"),
        pytest.param("cogvideox", {"rank": 4}, None, False, id="other-rank"),
        pytest.param("cogvideox", {"rank": 4}, True, True, id="told"),
        pytest.param("cogvideox", {"rank": 64, "blocks": 1}, None, False, id="not-every-block"),
        pytest.param("wan2.1", {"rank": 64}, None, True, id="wan"),
        pytest.param("wan2.2-a14b", {"rank": 64}, None, False, id="model-without-one"),
    ],
)
def test_a_lora_for_four_steps_is_known_by_its_form(name, kwargs, few_steps, is_one, tmp_path):
    pipe = CASES[name].build()
    scheduler = pipe.scheduler
    load_psa_lora(pipe, lora_file(tmp_path, name, **kwargs), few_steps=few_steps)
    assert (recipe_of(pipe) is not None) is is_one
    assert (pipe.scheduler is not scheduler) is is_one


def test_more_than_the_projections_is_another_lora(tmp_path):
    weights = lora_weights("wan2.1", rank=64)
    cross = {key.replace("attn1", "attn2"): value.clone() for key, value in weights.items()}
    save_file(weights | cross, tmp_path / "cross.safetensors")
    assert recipe_of(load_psa_lora(CASES["wan2.1"].build(), tmp_path / "cross.safetensors"))
    more = {
        key.replace("attn1.to_out.0", "ffn.net.2"): value.clone() for key, value in weights.items() if "to_out" in key
    }
    save_file(weights | more, tmp_path / "more.safetensors")
    assert recipe_of(load_psa_lora(CASES["wan2.1"].build(), tmp_path / "more.safetensors")) is None


# the second is the demo model, whose presets are those of the CogVideoX one, for which there is such a LoRA
@pytest.mark.parametrize(("name", "changes"), [("wan2.2-a14b", {}), ("wan2.1", {"in_channels": 8})])
def test_four_steps_of_a_model_without_such_a_lora_are_refused(name, changes, tmp_path):
    pipe = CASES[name].build()
    pipe.transformer.register_to_config(**changes)
    before = snapshot(pipe)
    with pytest.raises(
        ValueError, match=r"no LoRA for few steps for this pipeline, only for CogVideo_5b, Wan2\.1_1\.3b"
    ):
        load_psa_lora(pipe, lora_file(tmp_path, name), few_steps=True)
    assert_same_state(pipe, before)


def test_loading_it_into_a_running_pipeline_is_refused(tmp_path):
    pipe = CASES["cogvideox"].build()
    path = lora_file(tmp_path, "cogvideox", rank=64)

    def callback(pipeline, index, timestep, kwargs):
        with pytest.raises(RuntimeError, match="the pipeline is running"):
            load_psa_lora(pipeline, path)
        return kwargs

    before = snapshot(pipe)
    CASES["cogvideox"].run(pipe, callback_on_step_end=callback)
    assert pipe.transformer.transformer_blocks[0].attn1.to_q in before["modules"]


def test_a_failure_in_the_second_expert_takes_it_out_of_the_first(tmp_path, monkeypatch):
    name = "wan2.2-a14b"
    pipe = CASES[name].build()
    before = snapshot(pipe)
    weights = lora_weights(name) | lora_weights(name, prefix="transformer_2")
    save_file(weights, tmp_path / "both.safetensors")
    monkeypatch.setattr(pipe.transformer_2, "load_lora_adapter", None)  # not callable: fails in the middle
    with pytest.raises(TypeError):
        load_psa_lora(pipe, tmp_path / "both.safetensors")
    monkeypatch.undo()
    assert_same_state(pipe, before)


# at factor one, PSA and dense attention are the same


@both
@pytest.mark.parametrize("fuse", [False, True], ids=["loose", "fused"])
@pytest.mark.parametrize("order", ["lora-first", "psa-first"])
@torch.no_grad()
def test_at_factor_one_it_equals_the_lora_under_dense_attention(name, fuse, order, tmp_path, monkeypatch):
    path = lora_file(tmp_path, name, rank=64)
    pipe = CASES[name].build()
    inputs = captured_inputs(pipe, name, steps=1)[0]
    plain = pipe.transformer(**inputs)[0]
    full = {**TINY_PRESET, "mask_ratios": {1: [0, 1]}}
    if order == "psa-first":
        enable_psa(pipe, "psa_balanced", **full)
    load_psa_lora(pipe, path, scale=0.5, fuse=fuse)
    if order == "lora-first":
        enable_psa(pipe, **full)
    sparse = pipe.transformer(**inputs)[0]
    assert error(sparse, plain) > 1e-2, "the LoRA must matter here"
    disable_psa(pipe)
    dense = pipe.transformer(**inputs)[0]
    assert_as_close(sparse, dense, forward_in_float64(pipe, inputs, monkeypatch))


# several adapters, both experts


@both
@torch.no_grad()
def test_two_adapters_at_once_are_their_sum(name, tmp_path, monkeypatch):
    first, second = lora_weights(name, rank=64), lora_weights(name, rank=8, seed=2)
    save_file(first, tmp_path / "first.safetensors")
    save_file(second, tmp_path / "second.safetensors")
    pipe = CASES[name].build()
    inputs = captured_inputs(pipe, name, steps=1)[0]
    load_psa_lora(pipe, tmp_path / "first.safetensors")
    load_psa_lora(pipe, tmp_path / "second.safetensors", adapter_name="style")
    enable_psa(pipe, "psa_balanced", **TINY_PRESET)
    pipe.set_adapters(["psa", "style"], [1.0, 0.5])
    together = pipe.transformer(**inputs)[0]

    # one LoRA of rank 72 whose halves are those of both side by side
    joined = {
        key: torch.cat([first[key], second[key] * (0.5 if "lora_B" in key else 1.0)], dim=0 if "lora_A" in key else 1)
        for key in first
    }
    save_file({key: weight.contiguous() for key, weight in joined.items()}, tmp_path / "joined.safetensors")
    other = CASES[name].build()
    load_psa_lora(other, tmp_path / "joined.safetensors")
    enable_psa(other, "psa_balanced", **TINY_PRESET)
    assert_as_close(together, other.transformer(**inputs)[0], forward_in_float64(other, inputs, monkeypatch))

    unload_psa_lora(pipe, "style")
    assert pipe.get_list_adapters() == {"transformer": ["psa"]}
    assert pipe.get_active_adapters() == ["psa"]
    assert recipe_of(pipe) is not None
    unload_psa_lora(pipe)
    assert recipe_of(pipe) is None
    assert not hasattr(pipe.transformer, "peft_config")


def test_one_of_two_fused_adapters_can_be_taken_out(tmp_path):
    name = "cogvideox"
    save_file(lora_weights(name, seed=2), tmp_path / "style.safetensors")
    alone, pipe = CASES[name].build(), CASES[name].build()
    load_psa_lora(alone, tmp_path / "style.safetensors", adapter_name="style", fuse=True)
    load_psa_lora(pipe, tmp_path / "style.safetensors", adapter_name="style", fuse=True)
    path = lora_file(tmp_path, name, rank=64)
    with pytest.raises(ValueError, match=r"adapters style are fused .* Pass fuse=True to fuse this one as well"):
        load_psa_lora(pipe, path)
    load_psa_lora(pipe, path, fuse=True)
    assert pipe.fused_loras == {"style", "psa"}
    unload_psa_lora(pipe)
    assert pipe.fused_loras == {"style"}
    key = "transformer_blocks.0.attn1.to_q.base_layer.weight"
    ours, theirs = (each.transformer.state_dict()[key] for each in (pipe, alone))
    largest = 2 * float(theirs.abs().max()) + 64 * 4.0**2
    assert float((ours - theirs).abs().max()) <= 5 * torch.finfo(ours.dtype).eps * largest, "it was added five times"
    assert pipe.get_active_adapters() == ["style"]


def test_a_file_for_each_expert(tmp_path):
    name = "wan2.2-a14b"
    pipe = CASES[name].build()
    before = snapshot(pipe)
    save_file(lora_weights(name), tmp_path / "high.safetensors")
    save_file(lora_weights(name, seed=2), tmp_path / "low.safetensors")
    load_psa_lora(pipe, tmp_path / "high.safetensors")
    load_psa_lora(pipe, tmp_path / "low.safetensors", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {"transformer": ["psa"], "transformer_2": ["psa"]}
    theirs = CASES[name].build()
    theirs.load_lora_weights(tmp_path, weight_name="high.safetensors", adapter_name="psa")
    theirs.load_lora_weights(tmp_path, weight_name="low.safetensors", adapter_name="psa", load_into_transformer_2=True)
    assert torch.equal(CASES[name].run(pipe), CASES[name].run(theirs))
    unload_psa_lora(pipe)
    assert_same_state(pipe, before)


def test_what_is_not_loaded_cannot_be_unloaded(tmp_path):
    pipe = CASES["cogvideox"].build()
    with pytest.raises(ValueError, match="no adapter 'psa'; it has none"):
        unload_psa_lora(pipe)
    load_psa_lora(pipe, lora_file(tmp_path, "cogvideox"), adapter_name="style")
    with pytest.raises(ValueError, match="no adapter 'psa'; it has style"):
        unload_psa_lora(pipe)


# the published files, as far as their shapes are known


def full_size(name):
    """A pipeline class with its real denoiser, without memory for it."""
    with torch.device("meta"):
        if name == "cogvideox":
            denoiser = CogVideoXTransformer3DModel(
                num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
            )
            return CogVideoXPipeline(None, None, None, denoiser, None)
        denoiser = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
        return WanPipeline(None, None, None, None, denoiser)


PUBLISHED = {"cogvideox": (42, 3072), "wan2.1": (30, 1536)}


@both
def test_the_published_shapes_pass_at_full_size(name):
    pipe = full_size(name)
    blocks, width = PUBLISHED[name]
    with torch.device("meta"):
        weights = {
            f"transformer.{BLOCKS[name]}.{block}.attn1.{target}.lora_{half}.weight": torch.empty(shape)
            for block in range(blocks)
            for target in ("to_q", "to_k", "to_v", "to_out.0")
            for half, shape in (("A", (64, width)), ("B", (width, 64)))
        }
    modules = check_lora(pipe, weights, "published")
    assert len(weights) == blocks * 8
    assert set(modules["transformer"].values()) == {64}
    assert choose_recipe(pipe, modules, None).preset[1] == "psa_4steps"
    other = full_size({"cogvideox": "wan2.1", "wan2.1": "cogvideox"}[name])
    with pytest.raises(ValueError, match="LoRA of another model"):
        check_lora(other, weights, "published")
    key = f"transformer.{BLOCKS[name]}.{blocks - 1}.attn1.to_q.lora_A.weight"
    with pytest.raises(ValueError, match=f"{blocks - 1}.attn1.to_q has {width} inputs"):
        check_lora(pipe, {**weights, key: torch.empty(64, width + 64, device="meta")}, "published")


@both
def test_the_published_file_of_this_pipeline_is_found_in_a_copy_of_the_repository(name, tmp_path):
    folders = {"cogvideox": "cogvideox-5b-psa-lora", "wan2.1": "wan21-1.3b-psa-lora"}
    for each, folder in folders.items():
        (tmp_path / folder).mkdir()
        lora_file(tmp_path / folder, each, rank=64)
    pipe = load_psa_lora(CASES[name].build(), tmp_path)
    assert recipe_of(pipe) is not None
    load_psa_lora(CASES[name].build(), tmp_path, weight_name=f"{folders[name]}/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cogvideox", "cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors"),
        ("wan2.1", "wan21-1.3b-psa-lora/pytorch_lora_weights.safetensors"),
    ],
)
def test_the_published_file_is_known_on_the_hub(name, asked, monkeypatch):
    pipe = CASES[name].build()
    seen = SimpleNamespace()

    def answer(source, **kwargs):
        seen.source, seen.name = source, kwargs["weight_name"]
        return lora_weights(name, rank=64), None

    monkeypatch.setattr(type(pipe), "lora_state_dict", staticmethod(answer))
    load_psa_lora(pipe, REPOSITORY)
    assert (seen.source, seen.name) == (REPOSITORY, asked)
    assert recipe_of(pipe) is not None


def test_the_published_repository_without_a_file_for_this_pipeline():
    with pytest.raises(ValueError, match=r"has no LoRA for this pipeline, only for CogVideo_5b, Wan2\.1_1\.3b"):
        load_psa_lora(CASES["wan2.2-a14b"].build(), REPOSITORY)


# wrong files


WRONG = {
    "missing-file": (lambda folder: folder / "no.safetensors", FileNotFoundError, "no LoRA file at"),
    "missing-in-folder": (lambda folder: folder, FileNotFoundError, "no LoRA file .* in"),
    "text": (lambda folder: _write(folder, None), ValueError, "is not a safetensors file"),
    "no-keys": (lambda folder: _write(folder, {}), ValueError, "got none at all"),
    "foreign-keys": (
        lambda folder: _write(folder, {"lora_unet_x.alpha": torch.ones(1)}),
        ValueError,
        r"expected keys like 'transformer\.blocks\.0\.attn1\.to_q\.lora_A\.weight', got 'lora_unet_x\.alpha'",
    ),
    "no-prefix": (
        lambda folder: _write(folder, _renamed(lambda key: key.removeprefix("transformer."))),
        ValueError,
        "Convert it to the diffusers layout first",
    ),
    "other-family": (
        lambda folder: lora_file(folder, "wan2.1"),
        ValueError,
        r"transformer\.blocks.* does not exist in it",
    ),
    "other-size": (
        lambda folder: lora_file(folder, "cogvideox", width=48),
        ValueError,
        "has 32 inputs and 32 outputs, the LoRA 48 and 48",
    ),
    "other-rank": (
        lambda folder: _write(folder, _changed("lora_A", lambda weight: weight[:2])),
        ValueError,
        "halves of rank 2 and 4",
    ),
    "half-missing": (
        lambda folder: _write(folder, {key: value for key, value in lora_weights("cogvideox").items() if "_A" in key}),
        ValueError,
        "only one half of a LoRA, lora_A",
    ),
    "not-a-linear": (
        lambda folder: _write(folder, _renamed(lambda key: key.replace("to_q", "norm_q"))),
        ValueError,
        "not a linear or convolution layer",
    ),
    "no-second-expert": (
        lambda folder: lora_file(folder, "cogvideox", prefix="transformer_2"),
        ValueError,
        "weights for transformer_2, which this CogVideoXPipeline does not have",
    ),
}


def _write(folder, weights):
    path = folder / "lora.safetensors"
    if weights is None:
        path.write_text("no tensors here")
    else:
        save_file(weights, path)
    return path


def _renamed(rename):
    return {rename(key): weight for key, weight in lora_weights("cogvideox").items()}


def _changed(part, change):
    weights = lora_weights("cogvideox").items()
    return {key: change(weight).contiguous() if part in key else weight for key, weight in weights}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused_and_changes_nothing(wrong, tmp_path):
    make, expected, message = WRONG[wrong]
    pipe = CASES["cogvideox"].build()
    video = CASES["cogvideox"].run(pipe)
    keys = list(pipe.transformer.state_dict())
    with pytest.raises(expected, match=message):
        load_psa_lora(pipe, make(tmp_path))
    assert list(pipe.transformer.state_dict()) == keys
    assert pipe.get_list_adapters() == {}
    assert torch.equal(CASES["cogvideox"].run(pipe), video)


def test_a_taken_adapter_name_is_refused(tmp_path):
    path = lora_file(tmp_path, "cogvideox")
    pipe = load_psa_lora(CASES["cogvideox"].build(), path)
    with pytest.raises(ValueError, match="transformer has an adapter 'psa' already; choose another adapter_name"):
        load_psa_lora(pipe, path)


def test_something_that_cannot_load_loras_is_refused():
    with pytest.raises(TypeError, match="needs a pipeline that can load LoRAs, got WanTransformer3DModel"):
        load_psa_lora(tiny.wan_transformer(), "x.safetensors")


def test_a_hub_name_that_cannot_be_reached_is_a_missing_file(monkeypatch):
    pipe = CASES["cogvideox"].build()
    asked = []

    def unreachable(source, **kwargs):
        asked.append((source, kwargs["weight_name"]))
        raise OSError("offline")

    monkeypatch.setattr(type(pipe), "lora_state_dict", staticmethod(unreachable))
    with pytest.raises(FileNotFoundError, match=r"cannot get the LoRA 'somebody/lora' \(w\.safetensors\): offline"):
        load_psa_lora(pipe, "somebody/lora", weight_name="w.safetensors")
    assert asked == [("somebody/lora", "w.safetensors")]
