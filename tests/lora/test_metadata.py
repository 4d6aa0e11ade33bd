"""The settings of peft in a LoRA's file, and its numbers: what counts is checked, nothing else has an effect."""

import re
import time

import pytest
import torch
from lora_files import assert_same, content, everything, header, lora_file, lora_weights
from safetensors.torch import save_file
from tiny import CASES

from psa_diffusers.lora import load_psa_lora, unload_psa_lora

PATH = "blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def untouched():
    """A pipeline that no test here changes for good."""
    return CASES["wan2.1"].build()


@pytest.fixture
def pipe(untouched):
    """The same, for a LoRA that goes again."""
    yield untouched
    untouched.unload_lora_weights()


def changes(pipe):
    """What the LoRA adds to each module: its scaling, and the bytes of its halves."""
    return {
        path: (part.scaling["psa"], content(part.lora_A["psa"].weight), content(part.lora_B["psa"].weight))
        for path, part in pipe.transformer.named_modules()
        if hasattr(part, "base_layer")
    }


def load_as_diffusers_does(pipe, path):
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="psa")


def settings(**values):
    return {f"transformer.{name}": value for name, value in {"r": 4, "lora_alpha": 4, **values}.items()}


def load(pipe, folder, metadata, **kwargs):
    return load_psa_lora(pipe, lora_file(folder, "wan2.1", metadata=metadata), **kwargs)


REFUSED = {
    "pissa": (settings(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "corda": (settings(init_lora_weights="corda"), "must not change yours"),
    "loftq": (settings(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "init_lora_weights is 'loftq'"),
    "an unknown beginning": (settings(init_lora_weights=["olora"]), r"init_lora_weights is \['olora'\]"),
    "another kind": (settings(peft_type="ADALORA"), "peft_type is 'ADALORA', expected 'LORA'"),
    "magnitudes": (settings(use_dora=True), "use_dora is True: only plain LoRAs"),
    "whole modules": (settings(modules_to_save=["proj_out"]), "modules_to_save is .* only plain LoRAs"),
    "layers twice": (settings(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "parameters": (settings(target_parameters=["weight"]), "target_parameters"),
    "a setting of tomorrow": (settings(use_something_new={"a": 1}), "use_something_new is"),
    "another rank": (settings(r=8), r"says rank 8 for blocks\.0\.attn1\.to_\w, but its weights have rank 4"),
    "a huge rank": (settings(r=2_000_000_000), "says rank 2000000000"),
    "a rank of one module": (settings(rank_pattern={"1.attn1.to_v": 5}), "rank 5 for blocks.1.attn1.to_v"),
    "a rank in words": (settings(r="four"), "says rank 'four'"),
    "no rank": (settings(r=True), "says rank True"),
    "an alpha of NaN": (settings(lora_alpha=float("nan")), "lora_alpha or alpha_pattern is nan"),
    "an infinite alpha": (settings(alpha_pattern={PATH: float("-inf")}), f"is -inf for {PATH}"),
    "an alpha beyond floats": (settings(lora_alpha=10**400), "expected a finite number"),
    "an alpha in words": (settings(lora_alpha="16"), "is '16' for"),
    "an expression": (settings(alpha_pattern={r"(to_q|to_k)+": 2}), "has the expression .* expected names of modules"),
    "an expression without end": (settings(rank_pattern={r"(a|a?)+$": 4}), "has the expression"),
    "a pattern that is a list": (settings(rank_pattern=["to_q"]), "rank_pattern is .* expected values by name"),
    "a switch in words": (settings(use_rslora="no"), "use_rslora is 'no', expected true or false"),
    "another part": ({"unet.r": 4}, "'unet.r' in its metadata is for no part of this pipeline"),
    "a list": ([1, 2], "is a list, expected the settings of peft by name"),
    "a number": (5, "is a int, expected"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_settings_that_a_plain_lora_does_not_have_are_refused(wrong, untouched, tmp_path):
    metadata, message = REFUSED[wrong]
    before = everything(untouched)
    with pytest.raises(ValueError, match=message) as raised:
        load(untouched, tmp_path, metadata)
    assert len(str(raised.value)) < 700
    assert_same(untouched, before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{'transformer.r': 4}", "is not JSON that can be read", id="not-json"),
        pytest.param("[" * 100_000, "is not JSON that can be read", id="deep"),
        pytest.param("9" * 10_000, "is not JSON that can be read", id="long-number"),
        pytest.param('"' + "x" * 2**20 + '"', "expected at most 1048576", id="long"),
    ],
)
def test_metadata_that_cannot_be_read_are_refused(text, message, untouched, tmp_path):
    save_file(lora_weights("wan2.1"), tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message):
        load_psa_lora(untouched, tmp_path / "lora.safetensors")


EXPRESSIONS = [r"^(([a-z0-9._])+)+to_q!", r"(x+x+)+y", ["(a|aa)+$"], "all-linear", r".*"]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
def test_the_weights_say_which_modules_change_and_no_expression_is_matched(expression, pipe, tmp_path):
    keys = ("target_modules", "exclude_modules", "layers_pattern")
    start = time.perf_counter()
    load(pipe, tmp_path, settings(**dict.fromkeys(keys, expression), layers_to_transform=[0]))
    assert time.perf_counter() - start < 5
    names = ("to_q", "to_k", "to_v", "to_out.0")
    assert changes(pipe).keys() == {f"blocks.{block}.attn1.{name}" for block in range(2) for name in names}


def test_training_leaves_no_trace(pipe, tmp_path):
    before = everything(pipe)
    load_psa_lora(pipe, lora_file(tmp_path, "wan2.1"))
    plain = changes(pipe)
    unload_psa_lora(pipe)
    told = {"init_lora_weights": "gaussian", "bias": "all", "lora_dropout": 0.9, "fan_in_fan_out": True}
    load(pipe, tmp_path, settings(**told, inference_mode=True, base_model_name_or_path="somewhere"))
    assert changes(pipe) == plain
    assert everything(pipe)["random numbers"] == before["random numbers"]
    unload_psa_lora(pipe)
    after = everything(pipe)
    assert (after["tensors"], after["modules"]) == (before["tensors"], before["modules"])


USED = {
    "alpha": settings(lora_alpha=2),
    "rslora": settings(lora_alpha=2.5, use_rslora=True),
    "patterns": settings(
        lora_alpha=8,
        alpha_pattern={"^blocks.0.attn1.to_q": 1, "to_v": 0.5, r"attn1\.to_k": 3},
        rank_pattern={"to_q": 4},
    ),
    "no alpha": {"transformer.r": 4, "transformer.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
}


@pytest.mark.parametrize("used", USED)
def test_the_strength_is_that_which_diffusers_and_peft_give_it(used, pipe, tmp_path):
    names = {"transformer.target_modules": ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]}
    # which older diffusers does not do without
    empty = {"rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "lora_bias": False}
    empty = {f"transformer.{name}": value for name, value in empty.items()}
    path = lora_file(tmp_path, "wan2.1", metadata={**empty, **USED[used], **names})
    load_psa_lora(pipe, path)
    ours = changes(pipe)
    unload_psa_lora(pipe)
    load_as_diffusers_does(pipe, path)
    assert ours == changes(pipe)
    assert len(ours) == 8


def test_ranks_of_several_sizes_and_biases(pipe, tmp_path):
    weights = lora_weights("wan2.1") | {
        key: value for key, value in lora_weights("wan2.1", rank=6, seed=3).items() if "to_v" in key
    }
    weights[f"transformer.{PATH}.lora_B.bias"] = torch.arange(32.0) / 8
    save_file(weights, tmp_path / "lora.safetensors", header(settings(rank_pattern={"to_v": 6})))
    load_psa_lora(pipe, tmp_path / "lora.safetensors")
    assert pipe.transformer.blocks[1].attn1.to_v.r["psa"] == 6
    layer, x = pipe.transformer.blocks[0].attn1.to_q, torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    down, up = (weights[f"transformer.{PATH}.lora_{half}.weight"] for half in "AB")
    expected = layer.base_layer(x) + x @ down.T @ up.T + weights[f"transformer.{PATH}.lora_B.bias"]
    torch.testing.assert_close(layer(x), expected)
    assert not pipe.transformer.blocks[0].attn1.to_k.lora_B["psa"].bias.any()


# numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_weight_that_is_not_finite_is_refused(value, half, untouched, tmp_path):
    weights = lora_weights("wan2.1")
    weights[f"transformer.blocks.1.attn1.to_v.{half}.weight"].view(-1)[17] = value
    save_file(weights, tmp_path / "lora.safetensors")
    before = everything(untouched)
    with pytest.raises(ValueError, match=rf"NaN, infinity .* in blocks\.1\.attn1\.to_v\.{half}: the file is damaged"):
        load_psa_lora(untouched, tmp_path / "lora.safetensors")
    assert_same(untouched, before)


def test_numbers_that_the_denoisers_type_cannot_hold_are_refused(pipe, tmp_path):
    weights = lora_weights("wan2.1")
    weights[f"transformer.{PATH}.lora_B.weight"][0, 0] = 1e5
    save_file(weights, tmp_path / "lora.safetensors")
    load_psa_lora(pipe, tmp_path / "lora.safetensors")
    half = CASES["wan2.1"].build().to(torch.float16)
    with pytest.raises(ValueError, match=r"too large for torch\.float16 in blocks\.0\.attn1\.to_q\.lora_B"):
        load_psa_lora(half, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"with the strength 70000, too large for torch\.float16"):
        load_psa_lora(half, lora_file(tmp_path, "wan2.1"), scale=70_000)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": float("nan")}, ValueError, "scale is nan, expected a finite number"),
        ({"scale": float("-inf")}, ValueError, "scale is -inf"),
        ({"scale": "1"}, TypeError, "scale is '1', expected a number"),
        ({"scale": None}, TypeError, "scale is None"),
        ({"adapter_name": "a.b"}, ValueError, "a name without dots"),
        ({"adapter_name": ""}, ValueError, "a name without dots"),
        ({"adapter_name": "keys"}, ValueError, "that torch does not use"),
        ({"adapter_name": 3}, TypeError, "expected a string"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message, untouched, tmp_path):
    before = everything(untouched)
    with pytest.raises(error, match=message):
        load(untouched, tmp_path, None, **arguments)
    assert_same(untouched, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, untouched, tmp_path):
    weights = {key: weight.to(dtype) for key, weight in lora_weights("wan2.1").items()}
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=rf"has the type {dtype}, expected floating point"):
        load_psa_lora(untouched, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_other_types_become_the_denoisers(dtype, pipe, tmp_path):
    weights = {key: weight.to(dtype) for key, weight in lora_weights("wan2.1").items()}
    save_file(weights, tmp_path / "lora.safetensors")
    load_psa_lora(pipe, tmp_path / "lora.safetensors")
    loaded = pipe.transformer.get_submodule(PATH).lora_A["psa"].weight
    assert torch.equal(loaded, weights[f"transformer.{PATH}.lora_A.weight"].float())


def test_the_file_may_change_after_it_was_loaded(pipe, tmp_path):
    path = lora_file(tmp_path, "wan2.1")
    load_psa_lora(pipe, path)
    before = everything(pipe)
    path.write_bytes(b"x")
    assert_same(pipe, before)


# other layouts, which diffusers converts


def other_layout(**alphas):
    """The layout of Wan's own code: keys like `diffusion_model.blocks.0.self_attn.q.lora_down.weight`."""
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    weights = {}
    for key, weight in lora_weights("wan2.1", halves=("lora_down.weight", "lora_up.weight")).items():
        _, _, block, _, target = key.split(".lora")[0].split(".", 4)
        path = f"diffusion_model.blocks.{block}.self_attn.{names[target]}"
        weights[f"{path}.lora{key.split('.lora')[1]}"] = weight
        weights[f"{path}.alpha"] = torch.tensor(float(alphas.get(names[target], 4)))
    return weights


def test_another_layout_is_converted_with_its_alphas(pipe, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(other_layout(q=2), path)
    load_psa_lora(pipe, path)
    ours = changes(pipe)
    unload_psa_lora(pipe)
    load_as_diffusers_does(pipe, path)
    assert ours == changes(pipe)
    assert len(ours) == 8


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0])
def test_an_alpha_that_no_converter_can_use_is_refused(alpha, untouched, tmp_path):
    save_file(other_layout(v=alpha), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=rf"self_attn\.v\.alpha is {re.escape(f'{alpha:g}')}, expected one finite"):
        load_psa_lora(untouched, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("block", ["99999999999999", "1" * 5000, "x"])
def test_a_block_that_no_denoiser_has_does_not_keep_a_converter_busy(block, untouched, tmp_path):
    weights = {key.replace("blocks.1.", f"blocks.{block}."): weight for key, weight in other_layout().items()}
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is not a LoRA that diffusers can read"):
        load_psa_lora(untouched, tmp_path / "lora.safetensors")
