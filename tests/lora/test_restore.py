"""A load that fails half-way leaves the pipeline as it was, to the bit, whatever was loaded, fused or on before."""

import functools
import warnings

import accelerate
import peft.tuners.lora.layer as peft_layer
import pytest
import tiny
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from lora_files import assert_same, everything, lora_file, lora_weights
from safetensors.torch import save_file
from tiny import CASES, TINY_PRESET

from psa_diffusers.lora import load, load_psa_lora, recipe_of, undo
from psa_diffusers.pipelines.enable import enable_psa

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def nothing(pipe, path):
    """As it was built."""


def two_adapters(pipe, path):
    load_psa_lora(pipe, path, adapter_name="one")
    load_psa_lora(pipe, path, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.25, -1.5])
    pipe.disable_lora()


def fused(pipe, path):
    load_psa_lora(pipe, path, adapter_name="one", scale=0.3, fuse=True)
    load_psa_lora(pipe, path, adapter_name="two", scale=0.7, fuse=True)


def few_steps(pipe, path):
    load_psa_lora(pipe, path, adapter_name="one", few_steps=True)
    enable_psa(pipe, **TINY_PRESET)


def psa(pipe, path):
    enable_psa(pipe, **TINY_PRESET)


def model_offload(pipe, path):
    pipe.enable_model_cpu_offload(device="cpu")


def layer_offload(pipe, path):
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)


# where it fails: the object, its function, and the how-manieth call
PLACES = {
    "a layer is made": (peft_layer.Linear, "update_layer", 3),
    "a layer is activated": (peft_layer.LoraLayer, "set_adapter", 11),
    "weights are put in": (torch.nn.Module, "load_state_dict", 1),
    "the strength is set": (PeftAdapterMixin, "set_adapters", 1),
    "a layer is fused": (peft_layer.Linear, "merge", 5),
    "a layer is fused at last": (peft_layer.Linear, "merge", 8),
    "the settings are made": (load, "apply_setup", 1),
    "the class is made": (undo, "push_subclass", 1),
    "psa follows": (undo, "enable_psa", 1),
}


class Interrupted(BaseException):
    """As when somebody presses Ctrl-C."""


def interrupt(monkeypatch, place):
    """Fail after the work of the n-th call."""
    owner, name, count = PLACES[place]
    function, calls = getattr(owner, name), []

    @functools.wraps(function)
    def failing(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            raise Interrupted
        return result

    monkeypatch.setattr(owner, name, failing)
    return calls


# every state and every place, in pairs that can be
COMBINED = [
    *((nothing, place) for place in PLACES if place != "psa follows"),
    (two_adapters, "a layer is made"),
    (two_adapters, "a layer is activated"),
    (two_adapters, "a layer is fused"),
    (fused, "a layer is made"),
    (fused, "a layer is fused at last"),
    (few_steps, "a layer is fused"),
    (psa, "the class is made"),
    (psa, "psa follows"),
    (model_offload, "weights are put in"),
    (layer_offload, "a layer is made"),
]


@pytest.mark.parametrize(
    ("state", "place"), COMBINED, ids=[f"{state.__name__}-{place}".replace(" ", "_") for state, place in COMBINED]
)
def test_whatever_is_raised_the_pipeline_is_as_it_was(state, place, tmp_path, monkeypatch):
    pipe = CASES["cogvideox"].build()
    path = lora_file(tmp_path, "cogvideox", rank=8)
    state(pipe, path)
    before = everything(pipe)
    fuse = state is fused or "fused" in place
    interrupt(monkeypatch, place)
    with pytest.raises(Interrupted):
        load_psa_lora(pipe, path, adapter_name="late", few_steps=True, fuse=fuse)
    monkeypatch.undo()
    assert_same(pipe, before)


@pytest.mark.parametrize("state", [nothing, two_adapters, psa], ids=lambda state: state.__name__)
def test_after_a_failure_it_runs_as_before_and_loads_as_before(state, tmp_path, monkeypatch):
    run = CASES["wan2.1"].run
    pipe, other = CASES["wan2.1"].build(), CASES["wan2.1"].build()
    path = lora_file(tmp_path, "wan2.1", rank=8)
    for each in (pipe, other):
        state(each, path)
    interrupt(monkeypatch, "a layer is fused")
    with pytest.raises(Interrupted):
        load_psa_lora(pipe, path, adapter_name="late", few_steps=True, fuse=True)
    monkeypatch.undo()
    assert recipe_of(pipe) is None
    assert torch.equal(run(pipe), run(other))
    for each in (pipe, other):
        load_psa_lora(each, path, adapter_name="late", few_steps=True)
    assert torch.equal(run(pipe), run(other))


def test_a_warning_of_peft_that_is_an_error_changes_nothing(tmp_path):
    pipe = CASES["wan2.1"].build()
    path = lora_file(tmp_path, "wan2.1")
    load_psa_lora(pipe, path, adapter_name="one")
    before = everything(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UserWarning, KeyError)):  # the second is what older and newer diffusers make of the first
            load_psa_lora(pipe, path, adapter_name="two")
    assert_same(pipe, before)


def test_a_failure_in_the_second_expert_leaves_the_first_as_it_was(tmp_path, monkeypatch):
    name = "wan2.2-a14b"
    pipe = CASES[name].build()
    weights = lora_weights(name) | lora_weights(name, prefix="transformer_2", seed=4)
    path = tmp_path / "both.safetensors"
    save_file(weights, path)
    load_psa_lora(pipe, path, adapter_name="one", scale=0.4, fuse=True)
    before = everything(pipe)
    monkeypatch.setitem(PLACES, "deep in the second", (peft_layer.Linear, "merge", 8 + 5))
    interrupt(monkeypatch, "deep in the second")
    with pytest.raises(Interrupted):
        load_psa_lora(pipe, path, adapter_name="two", fuse=True)
    monkeypatch.undo()
    assert_same(pipe, before)


# files that failed half-way, or late, in peft


def change(key, make):
    return lambda weights: {**weights, key: make(weights[key]).contiguous()}


QUERY = "transformer.blocks.0.attn1.to_q"
BAD = {
    "four dimensions": change(f"{QUERY}.lora_A.weight", lambda weight: weight[:, :, None, None]),
    "three dimensions": change(f"{QUERY}.lora_B.weight", lambda weight: weight[None]),
    "one dimension": change(f"{QUERY}.lora_A.weight", lambda weight: weight[0]),
    "a number": change(f"{QUERY}.lora_B.weight", lambda weight: weight[0, 0]),
    "rank 0": lambda weights: {
        key: weight[:0] if "lora_A" in key else weight[:, :0].contiguous() for key, weight in weights.items()
    },
    "a bias of another width": lambda weights: weights | {f"{QUERY}.lora_B.bias": torch.zeros(31)},
    "a bias of A": lambda weights: weights | {f"{QUERY}.lora_A.bias": torch.zeros(4)},
    "twice": lambda weights: weights | {f"{QUERY}.lora.down.weight": weights[f"{QUERY}.lora_A.weight"].clone()},
    "a whole module": lambda weights: weights | {"transformer.proj_out.weight": torch.zeros(16, 32)},
    "a magnitude": lambda weights: weights | {f"{QUERY}.lora_magnitude_vector": torch.ones(32)},
    "inside another": lambda weights: {
        key.replace("to_q", "to_q.base_layer"): weight for key, weight in weights.items()
    },
    "a convolution without kernel": lambda weights: (
        weights
        | {
            "transformer.patch_embedding.lora_A.weight": torch.zeros(4, 16),
            "transformer.patch_embedding.lora_B.weight": torch.zeros(32, 4),
        }
    ),
}


@pytest.fixture(scope="module")
def with_one(tmp_path_factory):
    """A pipeline with an adapter."""
    return load_psa_lora(
        CASES["wan2.1"].build(), lora_file(tmp_path_factory.mktemp("one"), "wan2.1"), adapter_name="one"
    )


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(bad, with_one, tmp_path):
    save_file(BAD[bad](lora_weights("wan2.1")), tmp_path / "lora.safetensors")
    before = everything(with_one)
    with pytest.raises(ValueError, match=r"lora\.safetensors (is|has)"):
        load_psa_lora(with_one, tmp_path / "lora.safetensors")
    assert_same(with_one, before)


def test_a_lora_of_a_convolution_is_loaded(tmp_path):
    pipe = tiny.wan()
    conv = pipe.transformer.patch_embedding
    weights = {
        "transformer.patch_embedding.lora_A.weight": torch.ones(4, conv.in_channels, *conv.kernel_size),
        "transformer.patch_embedding.lora_B.weight": torch.ones(conv.out_channels, 4, 1, 1, 1),
    }
    save_file(weights, tmp_path / "lora.safetensors")
    x = torch.ones(1, conv.in_channels, 1, *conv.kernel_size[1:])
    plain = conv(x)
    load_psa_lora(pipe, tmp_path / "lora.safetensors")
    torch.testing.assert_close(pipe.transformer.patch_embedding(x), plain + 4 * x.sum())
