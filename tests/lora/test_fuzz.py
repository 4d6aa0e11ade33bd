"""Mutated LoRA files: the pipeline has the LoRA afterwards, or is what it was, to the bit. No hang, nothing large."""

import json
import signal
import struct
import time
import tracemalloc
from contextlib import contextmanager

import pytest
import torch
from fuzz import cases
from hypothesis import event, given, note
from hypothesis import strategies as st
from lora_files import assert_same, everything, header, lora_weights
from safetensors.torch import save
from tiny import CASES, TINY_PRESET
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from psa_diffusers.lora import load_psa_lora, unload_psa_lora
from psa_diffusers.pipelines.enable import enable_psa
from psa_diffusers.pipelines.state import state_of

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]

LONGEST = 5.0  # seconds
TIMES = 10  # of the file that an allocation may have
PYTHON = 2**22  # bytes that Python may take for any file: modules of peft, the attributes that are kept, a traceback

SETTINGS = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k"], "rank_pattern": {}, "alpha_pattern": {}}


def other_layout():
    """The layout of Wan's own code, which diffusers converts."""
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    weights = {}
    for key, weight in lora_weights("wan2.1").items():
        path, half = key.split(".lora_")
        _, _, block, _, target = path.split(".", 4)
        weights[f"diffusion_model.blocks.{block}.self_attn.{names[target]}.lora_{half}"] = weight
        weights[f"diffusion_model.blocks.{block}.self_attn.{names[target]}.alpha"] = torch.tensor(4.0)
    return weights


def all_settings():
    return header({f"transformer.{name}": value for name, value in SETTINGS.items()})


FILES = {
    "plain": lambda: save(lora_weights("wan2.1")),
    "settings": lambda: save(lora_weights("wan2.1"), all_settings()),
    "half precision": lambda: save({key: weight.half() for key, weight in lora_weights("wan2.1").items()}),
    "older": lambda: save(lora_weights("wan2.1", halves=("lora.down.weight", "lora.up.weight"))),
    "other layout": lambda: save(other_layout()),
    "four steps": lambda: save(lora_weights("wan2.1", rank=64), header({"transformer.r": 64})),
}

# mutations: of the header as JSON, of the settings in it, of the numbers, of the bytes of the whole file

TYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "X",
    "",
    7,
]
SIDES = st.sampled_from([0, 1, 2, 3, 4, 8, 31, 32, 64, 128, 2**20, 2**31, 2**62, -1, 1.5])
SHAPES = st.lists(SIDES, max_size=5)
NAMES = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"),
    *("init_lora_weights", "use_dora", "use_rslora", "lora_bias", "bias", "lora_dropout", "layers_pattern"),
    *("layers_to_transform", "peft_type", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("fan_in_fan_out", "megatron_core", "task_type", "inference_mode", "something_new", "loftq_config"),
]
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, 4, -4, 8, 3_000_000, 2**70, 1e-320, 1e308, float("nan"), float("inf"), 0.5),
        *("", "4", "pissa", "pissa_niter_2", "olora", "corda", "loftq", "gaussian", "eva", "orthogonal", "lora_ga"),
        *("all", "LORA", "LOHA", "all-linear", r"(([a-z0-9._]+)+)+!", r"^(a|aa)+$", r".*to_q", "to_q"),
        *([], ["to_q"], ["proj_out"], [r"(x+x+)+y"], [0], [[0, 2]], {}, {"to_q": 4}, {"to_q": 3_000_000}, {"^to_q": 1}),
        *({r"(.*)*!": 4}, {"to_v": float("nan")}, {"blocks": {}}, {"": 4}, [[[[[]]]]], "x" * 10_000, [7] * 1000),
    ]
)
NUMBERS = [float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1e-40, 0.0]


@st.composite
def mutated(draw, kinds):
    """A file as bytes, of which something is not as it was written; nothing, now and then."""
    data = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))]())
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(kinds))
        if len(data) < 64:
            break
        data = kind(draw, data)
    return bytes(data)


def of_header(draw, data):
    head, body = split(data)
    if not head:
        return data
    key = draw(st.sampled_from(sorted(head)))
    if key == "__metadata__":
        head[key] = draw(st.sampled_from([{}, {"lora_adapter_metadata": "["}, {"format": "np"}, 5]))
        return join(head, body)
    match draw(st.sampled_from(["type", "shape", "offsets", "rename", "drop", "add"])):
        case "type":
            head[key]["dtype"] = draw(st.sampled_from(TYPES))
        case "shape":
            head[key]["shape"] = draw(SHAPES)
        case "offsets":
            head[key]["data_offsets"] = draw(st.lists(st.sampled_from([0, 1, 512, 2**40, -4]), min_size=1, max_size=3))
        case "rename":
            old, new = draw(
                st.sampled_from(
                    [
                        *(("lora_A", "lora_B"), ("lora_A", "lora_C"), ("weight", "bias"), ("transformer", "vae")),
                        *(("blocks.0", "blocks.1"), ("blocks.1", "blocks.7"), ("blocks.", "blocks.999999999999")),
                        *(("to_q", "to_q.base_layer"), ("to_k", "norm_k"), ("transformer.", ""), ("attn1", "attn2")),
                        *(("alpha", "diff_b"), ("self_attn", "cross_attn"), ("lora_", "lokr_"), ("weight", "alpha")),
                    ]
                )
            )
            head[key.replace(old, new)] = head.pop(key)
        case "drop":
            head.pop(key)
        case "add":
            name = draw(
                st.sampled_from(["transformer.proj_out.weight", "dora_scale", "transformer.x.alpha", "lora_unet_1"])
            )
            head[name] = head[key]
    return join(head, body)


def of_settings(draw, data):
    head, body = split(data)
    if head is None or not isinstance(head.get("__metadata__", {}), dict):
        return data
    metadata = dict(head.get("__metadata__", {}))
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError, TypeError):
        return data
    if not isinstance(settings, dict):
        return data
    prefix = draw(st.sampled_from(["transformer.", "transformer.", "transformer.", "transformer_2.", ""]))
    settings[prefix + draw(st.sampled_from(NAMES))] = draw(VALUES)
    text = json.dumps(settings)
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from(["[" * 5000, "9" * 5000, '"', "{", "\\", "\0"])) + text[place + 1 :]
    metadata["lora_adapter_metadata"] = text
    head["__metadata__"] = metadata
    return join(head, body)


def of_shapes(draw, data):
    """Another shape whose size is right, so that safetensors takes it."""
    head, body = split(data)
    keys = sorted(key for key in head or () if isinstance(head[key].get("shape"), list))
    if not keys:
        return data
    shape = head[draw(st.sampled_from(keys))]["shape"]
    if draw(st.booleans()):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    elif len(shape) > 1 and all(isinstance(side, int) for side in shape):
        shape[:] = draw(st.sampled_from([shape[::-1], [shape[0] * shape[1], *shape[2:]], [1, *shape], [0, *shape]]))
    return join(head, body)


def of_numbers(draw, data):
    head, body = split(data)
    keys = sorted(key for key in head or () if key != "__metadata__" and head[key].get("dtype") == "F32")
    if not keys:
        return data
    offsets = head[draw(st.sampled_from(keys))].get("data_offsets")
    place = 4 * draw(st.integers(0, 15))
    if isinstance(offsets, list) and offsets and isinstance(offsets[0], int):
        place += offsets[0]
    if 0 <= place <= len(body) - 4:
        struct.pack_into("<f", body, place, draw(st.sampled_from(NUMBERS)))
    return join(head, body)


def of_bytes(draw, data):
    size = min(len(data), 8 + struct.unpack_from("<Q", data)[0])
    for _ in range(draw(st.integers(1, 4))):
        within = size if draw(st.booleans()) else len(data)
        data[draw(st.integers(0, within - 1))] ^= draw(st.integers(1, 255))
    return data


def of_length(draw, data):
    match draw(st.sampled_from(["cut", "grow", "header", "empty"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "grow":
            return data + bytes(draw(st.integers(1, 100)))
        case "header":
            struct.pack_into("<Q", data, 0, draw(st.sampled_from([0, 1, 100, 10**8, 2**40, 2**64 - 1])))
            return data
        case _:
            return bytearray()


def split(data):
    try:
        size = struct.unpack_from("<Q", data)[0]
        head = json.loads(bytes(data[8 : 8 + size]))
    except (ValueError, RecursionError, OverflowError):
        return None, data
    is_header = isinstance(head, dict) and all(isinstance(each, dict) for each in head.values())
    return (head if is_header else None), bytearray(data[8 + size :])


def join(head, body):
    text = json.dumps(head).encode()
    return bytearray(struct.pack("<Q", len(text)) + text + body)


KINDS = (of_header, of_settings, of_settings, of_shapes, of_numbers, of_bytes, of_length)

# pipelines that the files are loaded into


def plain(pipe, path):
    """As it was built."""


def with_psa(pipe, path):
    enable_psa(pipe, **TINY_PRESET)


def two_adapters(pipe, path):
    load_psa_lora(pipe, path, adapter_name="one")
    load_psa_lora(pipe, path, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -2.0])


def fused(pipe, path):
    load_psa_lora(pipe, path, adapter_name="one", scale=0.3, fuse=True)


def four_steps(pipe, path):
    load_psa_lora(pipe, path, adapter_name="one", few_steps=True)
    enable_psa(pipe)


STATES = {each.__name__: each for each in (plain, with_psa, two_adapters, fused, four_steps)}


class Pipelines:
    """One pipeline a state, made anew after a LoRA that cannot be taken out to the bit."""

    def __init__(self, folder):
        self.path = folder / "first.safetensors"
        self.path.write_bytes(FILES["plain"]())
        self.made = {}

    def take(self, state):
        """A pipeline, and all that it is. Who leaves it as it was gives it back."""
        if state not in self.made:
            pipe = CASES["wan2.1"].build()
            STATES[state](pipe, self.path)
            return pipe, everything(pipe)
        return self.made.pop(state)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    pipelines = Pipelines(tmp_path_factory.mktemp("fuzz"))
    load_psa_lora(CASES["wan2.1"].build(), pipelines.path)  # what is imported and compiled once
    return pipelines


class Largest(TorchDispatchMode):
    """The largest memory that an operation of torch has returned."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta and id(leaf) not in given:
                self.size = max(self.size, leaf.untyped_storage().nbytes())
        return out


class Hang(BaseException):
    """It took too long."""


@contextmanager
def deadline():
    """Fails after the longest time, also inside a regular expression."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 3 * LONGEST)
    start = time.process_time()  # other work on the machine does not count
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < LONGEST


def load_watched(pipe, path, **arguments):
    """Load, and see how long it takes and what it allocates."""
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with deadline(), Largest() as largest:
            load_psa_lora(pipe, path, **arguments)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= TIMES * size + PYTHON, f"Python took {peak} bytes for a file of {size}"
        bound = TIMES * size
        if arguments.get("fuse"):  # whatever the file, the sum has the size of the weights
            bound = max(bound, max(each.nbytes for each in pipe.transformer.parameters()))
        assert largest.size <= bound, f"{largest.size} bytes were allocated for a file of {size}"


def assert_has_lora(pipe):
    """The adapter is there, active, and every number of it finite."""
    layers = [part for part in pipe.transformer.modules() if "late" in getattr(part, "lora_A", ())]
    assert layers
    for layer in layers:
        assert layer.active_adapters == ["late"]
        assert abs(layer.scaling["late"]) < float("inf")
        for half in (layer.lora_A["late"], layer.lora_B["late"]):
            assert half.weight.dtype == layer.get_base_layer().weight.dtype
            assert bool(half.weight.isfinite().all())
    assert "late" in pipe.get_list_adapters()["transformer"]


@cases(40, 1200)
@given(
    data=mutated(KINDS),
    state=st.sampled_from(sorted(STATES)),
    fuse=st.booleans(),
    scale=st.sampled_from([1.0, 1.0, 0.5, float("nan"), 1e39]),
)
def test_a_mutated_file_is_loaded_or_leaves_no_trace(data, state, fuse, scale, pipelines):
    path = pipelines.path.with_name("late.safetensors")
    path.write_bytes(data)
    pipe, before = pipelines.take(state)
    try:
        load_watched(pipe, path, adapter_name="late", fuse=fuse, scale=scale)
    except (ValueError, TypeError) as error:
        note(str(error))
        event("refused")
        assert_same(pipe, before)
        pipelines.made[state] = pipe, before
        return
    event("loaded")
    assert_has_lora(pipe)
    unload_psa_lora(pipe, "late")
    after = everything(pipe)
    assert after["modules"].keys() == before["modules"].keys()
    assert (state_of(pipe).lora is None) is (state != "four_steps")
    if not fuse:
        assert after["tensors"] == before["tensors"]
