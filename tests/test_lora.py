"""`load_psa_lora`: real files, right and wrong ones."""

import pytest
import tiny
import torch
from forwards import assert_as_close, captured_inputs, error, forward_in_float64
from safetensors.torch import save_file
from tiny import CASES, TINY_PRESET

from psa_diffusers.lora import load_psa_lora
from psa_diffusers.pipeline import disable_psa, enable_psa

CHOICE = {**TINY_PRESET, "warmup_steps": 1}
BLOCKS = {"cogvideox": "transformer_blocks", "wan2.1": "blocks", "wan2.2-a14b": "blocks"}
both = pytest.mark.parametrize("name", ["cogvideox", "wan2.1"])


def lora_weights(name, *, prefix="transformer", rank=4, width=32, halves=("lora_A.weight", "lora_B.weight")):
    """LoRA on the projections of the self-attentions of two blocks."""
    rng = torch.Generator().manual_seed(1)
    weights = {}
    for block in range(2):
        for target in ("to_q", "to_k", "to_v", "to_out.0"):
            path = f"{prefix}.{BLOCKS[name]}.{block}.attn1.{target}"
            weights[f"{path}.{halves[0]}"] = torch.randn(rank, width, generator=rng)
            weights[f"{path}.{halves[1]}"] = torch.randn(width, rank, generator=rng)
    return weights


def lora_file(folder, name, **kwargs):
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(lora_weights(name, **kwargs), path)
    return path


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


# peft announces a second adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
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
    with pytest.raises(ValueError, match="has an adapter 'psa' already; choose another adapter_name"):
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
