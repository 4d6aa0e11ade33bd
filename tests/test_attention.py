"""The public functions: bad input, broken numbers, determinism, compilation, gradients."""

import copy
import itertools
import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from psa_diffusers import PSAPreset, assign_levels, psa_attention, pyramid_attention
from psa_diffusers.ops import reference
from psa_diffusers.ops.layout import flat_layout
from psa_diffusers.ops.reference.tilt import tilt_gain

PRESET = PSAPreset(block_size={"m": 32, "n": 32}, mask_ratios={1: [0, 0.2], 4: [0.2, 0.5], 0: [0.5, 1]})
GRID = (4, 6, 8)
NUMBERS = itertools.count()


def qkv(rng, tokens=192, dtype=torch.float32, dim=16):
    return tuple(torch.randn(1, 2, tokens, dim, generator=rng).to(dtype) for _ in range(3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q, k[:, :, :-1], v), ValueError, "one shape"),
        (lambda q, k, v: (q[0], k[0], v[0]), ValueError, "one shape"),
        (lambda q, k, v: (q, k.half(), v), TypeError, "one dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, "float32"),
        (lambda q, k, v: (q[..., :12], k[..., :12], v[..., :12]), ValueError, "multiple of 8 from 16 to 256, got 12"),
        (lambda q, k, v: (q[..., :8], k[..., :8], v[..., :8]), ValueError, "got 8"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), ValueError, "must not be empty"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, error, message, rng):
    with pytest.raises(error, match=message):
        psa_attention(*change(*qkv(rng)), PRESET)
    with pytest.raises(error, match=message):
        pyramid_attention(*change(*qkv(rng)), torch.ones(1, 2, 6, 6), block_m=32, block_n=32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"grid": (4, 6, 7)}, "192 tokens, but the grid 4 x 6 x 7 and 0 text tokens make 168"),
        ({"grid": GRID, "text_tokens": 5}, "make 197"),
        ({"grid": (0, 6, 8)}, "each at least 1"),
        ({"grid": GRID, "backend": "cuda"}, "auto, torch, triton"),
        ({"grid": GRID, "preset": "psa_balancd"}, "psa_balanced"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs, message, rng):
    with pytest.raises(ValueError, match=message):
        psa_attention(*qkv(rng), **{"preset": PRESET, **kwargs})


def test_a_preset_of_another_kind_is_refused(rng):
    with pytest.raises(TypeError, match="a name or a PSAPreset, got a dict"):
        psa_attention(*qkv(rng), {"mask_ratios": {1: [0, 1]}})


def test_triton_is_refused_on_a_cpu_and_auto_is_torch(rng, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = qkv(rng)
    with pytest.raises(RuntimeError, match="backend='torch'"):
        psa_attention(q, k, v, PRESET, backend="triton")
    auto, plain = (psa_attention(q, k, v, PRESET, grid=GRID, backend=backend) for backend in ("auto", "torch"))
    assert torch.equal(auto, plain)


@pytest.mark.parametrize(
    ("level_map", "message"),
    [
        (torch.ones(1, 2, 6, 5), "M, N"),
        (torch.full((1, 2, 6, 6), 3), "holds factors"),
        (torch.full((1, 2, 6, 6), 64), "one of"),
        (torch.full((1, 2, 6, 6), -1), "holds factors"),
    ],
)
def test_level_maps_that_do_not_fit_are_refused(level_map, message, rng):
    with pytest.raises(ValueError, match=message):
        pyramid_attention(*qkv(rng), level_map, block_m=32, block_n=32)


def test_blocks_must_be_powers_of_two(rng):
    with pytest.raises(ValueError, match="block_n must be a power of two, got 48"):
        pyramid_attention(*qkv(rng), torch.ones(1, 2, 6, 4), block_m=32, block_n=48)


def test_assign_levels_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="'topk' or 'thresholdbound'"):
        assign_levels(torch.rand(1, 1, 2, 2), {1: [0, 1]}, "quantile")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"q": [[0.0]]}, "q must be a tensor .*, got a list"),
        ({"v": np.zeros((1, 2, 192, 16))}, "v must be a tensor .*, got a ndarray"),
        ({"text_tokens": 2.0}, "text_tokens must be an integer, counted in tokens, got 2.0"),
        ({"text_tokens": "2"}, "text_tokens must be an integer"),
        ({"text_tokens": True}, "text_tokens must be an integer.*got True"),
        ({"text_tokens": None}, "text_tokens must be an integer"),
        ({"grid": (4.0, 6, 8)}, "grid must be .*three integers.*got"),
        ({"grid": (4, 6, "8")}, "grid must be .*three integers"),
        ({"grid": 192.5}, "grid must be .*three integers"),
        ({"grid": torch.tensor([4, 6, 8])}, "grid must be .*three integers"),
        ({"text_first": 1}, "text_first must be True or False, got 1"),
        ({"text_first": "no"}, "text_first must be True or False"),
        ({"scale": "large"}, "scale must be a number, got a str"),
        ({"scale": True}, "scale must be a number, got a bool"),
        ({"scale": [1.0]}, "scale must be a number, got a list"),
        ({"schedule": (1, 2)}, "must be a Schedule.*got a tuple"),
    ],
)
def test_arguments_of_another_kind_are_type_errors(kwargs, message, rng):
    given = {**dict(zip("qkv", qkv(rng), strict=True)), "preset": PRESET, **kwargs}
    with pytest.raises(TypeError, match=message):
        psa_attention(**given)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf, 1e30, 10**20])
def test_a_scale_out_of_range_is_refused(scale, rng):
    with pytest.raises(ValueError, match=r"scale must be a finite number.*got"):
        psa_attention(*qkv(rng), PRESET, scale=scale)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        pyramid_attention(*qkv(rng), torch.ones(1, 2, 6, 6).int(), block_m=32, block_n=32, scale=scale)


def test_integers_of_other_kinds_are_integers(rng):
    q, k, v = qkv(rng)
    plain = psa_attention(q, k, v, PRESET, grid=(2, 10, 9), text_tokens=12, scale=0.5)
    given = {"grid": np.array([2, 10, 9]), "text_tokens": np.int64(12), "scale": torch.tensor(0.5)}
    assert torch.equal(psa_attention(q, k, v, PRESET, **given), plain)


@pytest.mark.parametrize("backend", [None, "Triton", 3, ["torch"]])
def test_a_backend_that_does_not_exist_is_refused(backend, rng):
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got"):
        psa_attention(*qkv(rng), PRESET, backend=backend)


@pytest.mark.parametrize(
    ("level_map", "message"),
    [
        (torch.ones(1, 2, 6, 6), r"integers.*got torch.float32: cast it with .to\(torch.int16\)"),
        (torch.ones(1, 2, 6, 6).bfloat16(), "got torch.bfloat16"),
        (torch.ones(1, 2, 6, 6, dtype=torch.bool), "got torch.bool"),
        (torch.ones(1, 2, 6, 6, dtype=torch.complex64), "got torch.complex64"),
        (torch.ones(1, 2, 6, 6).int().tolist(), "got a list"),
        (np.ones((1, 2, 6, 6), dtype=np.int16), "got a ndarray: torch.as_tensor makes one"),
        (None, "got a NoneType"),
    ],
)
def test_level_maps_of_another_kind_are_type_errors(level_map, message, rng):
    with pytest.raises(TypeError, match=f"level_map must .*{message}"):
        pyramid_attention(*qkv(rng), level_map, block_m=32, block_n=32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int32, torch.uint64])
def test_level_maps_of_any_integer_are_read(dtype, rng):
    tensors, level_map = qkv(rng), torch.randint(0, 3, (1, 2, 6, 6), generator=rng)
    plain = pyramid_attention(*tensors, level_map, block_m=32, block_n=32)
    assert torch.equal(pyramid_attention(*tensors, level_map.to(dtype), block_m=32, block_n=32), plain)


@pytest.mark.parametrize("value", [2**16, 2**17, 2**32, -(2**15)])
def test_a_factor_does_not_wrap_to_another(value, rng):
    level_map = torch.full((1, 2, 6, 6), value)
    with pytest.raises(ValueError, match=f"holds factors \\[{value}\\]"):
        pyramid_attention(*qkv(rng), level_map, block_m=32, block_n=32)


def test_the_largest_factors_are_factors(rng):
    q, k, v = qkv(rng, tokens=40)
    factor = 2**16
    level_map = torch.full((1, 2, 3, 1), factor)
    out = pyramid_attention(q, k, v, level_map, block_m=16, block_n=factor)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))


@pytest.mark.parametrize(
    ("block", "error"), [(32.0, TypeError), ("32", TypeError), (True, TypeError), (2**40, ValueError)]
)
@pytest.mark.parametrize("name", ["block_m", "block_n"])
def test_blocks_of_another_kind_are_refused(name, block, error, rng):
    with pytest.raises(error, match=f"{name} must be .*power of two, got"):
        pyramid_attention(*qkv(rng), torch.ones(1, 2, 6, 6).int(), **{"block_m": 32, "block_n": 32, name: block})


@pytest.mark.parametrize(
    ("importance", "kwargs", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "importance must be a tensor of real numbers .*got a list"),
        (torch.ones(2, 2, dtype=torch.complex64), {}, TypeError, "got torch.complex64"),
        (torch.tensor(1.0), {}, ValueError, r"at least one block a row, got shape \(\)"),
        (torch.ones(1, 1, 2, 0), {}, ValueError, "at least one block a row"),
        (torch.tensor([[0.5, -0.5]]), {"mask_mode": "thresholdbound"}, ValueError, "none may be negative, got -0.5"),
        (torch.ones(2, 2), {"min_full_ratio": 2}, ValueError, r"must lie in \[0, 1\], got 2"),
        (torch.ones(2, 2), {"min_full_ratio": -1}, ValueError, r"must lie in \[0, 1\], got -1"),
        (torch.ones(2, 2), {"min_full_ratio": torch.nan}, ValueError, "got nan"),
        (torch.ones(2, 2), {"min_full_ratio": torch.inf}, ValueError, "got inf"),
        (torch.ones(2, 2), {"min_full_ratio": "0.1"}, TypeError, "must be a number from 0 to 1, got a str"),
        (torch.ones(2, 2), {"min_full_ratio": True}, TypeError, "got a bool"),
        (torch.ones(2, 2), {"min_full_ratio": None}, TypeError, "got a NoneType"),
        (torch.ones(2, 2), {"mask_mode": None}, ValueError, "mask_mode"),
    ],
)
def test_assign_levels_refuses_what_has_no_order_or_no_sum(importance, kwargs, error, message):
    with pytest.raises(error, match=message):
        assign_levels(importance, {1: [0, 0.5], 0: [0.5, 1]}, **kwargs)


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.bool])
def test_levels_are_the_same_in_any_dtype(dtype, mode, rng):
    importance = torch.randint(0, 2 if dtype == torch.bool else 100, (1, 2, 3, 40), generator=rng)
    ratios = {1: [0, 0.25], 2: [0.25, 0.5], 0: [0.5, 1]}
    expected = assign_levels(importance.double(), ratios, mode)
    assert torch.equal(assign_levels(importance.to(dtype), ratios, mode), expected)


BROKEN = [(name, value, place) for name in "qkv" for value in (torch.nan, torch.inf, -torch.inf) for place in (0, 100)]


@pytest.mark.parametrize("importance", ["pooled_mass", "pooled_moments", "sampled_max"])
@pytest.mark.parametrize(("name", "value", "place"), BROKEN)
def test_broken_numbers_come_out_where_dense_attention_has_them(name, value, place, importance, rng):
    tensors = dict(zip("qkv", qkv(rng), strict=True))
    tensors[name][0, 1, place, 3] = value
    gain = "sampled" if importance == "pooled_moments" else "full"
    preset = PRESET.replace(importance=importance, key_variance=True, value_tilt=True, tilt_gain=gain)
    out = psa_attention(**tensors, preset=preset, grid=GRID, backend="torch")
    dense = F.scaled_dot_product_attention(*(tensors[n].double() for n in "qkv"))
    assert torch.equal(out.isnan(), dense.isnan())
    assert torch.isfinite(out[0, 0]).all(), "the other head is not touched"


@pytest.mark.parametrize("importance", ["pooled_moments", "sampled_max"])
def test_two_calls_are_bit_equal_and_leave_the_random_state(importance, rng):
    q, k, v = qkv(rng)
    before = torch.random.get_rng_state()
    preset = PRESET.replace(importance=importance, key_variance=True, value_tilt=True, tilt_gain="sampled")
    first, second = (psa_attention(q, k, v, preset, grid=GRID) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_dense_preset_is_dense_attention(rng):
    q, k, v = qkv(rng)
    out, schedule = psa_attention(q, k, v, PSAPreset(type="dense"), grid=GRID, return_schedule=True)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert schedule.density() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes_the_checks_of_torch(dtype, rng):
    from psa_diffusers.attention import _psa_op

    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(rng, dtype=dtype))
    args = (q, k, v, PRESET.key, list(GRID), 0, True, 0.25, "torch")
    torch.library.opcheck(_psa_op, args, test_utils=("test_schema", "test_faketensor"))


def test_compiled_code_stays_one_graph(rng):
    q, k, v = qkv(rng)
    call = lambda q, k, v: psa_attention(q + 0, k, v, PRESET, grid=GRID) * 2  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), call(q, k, v))


def unused_preset(importance="pooled_mass"):
    """A preset that nothing in this process has run before: its name occurs once."""
    return PRESET.replace(name=f"unused {next(NUMBERS)}", importance=importance)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(lambda preset: preset, id="fresh"),
        pytest.param(lambda preset: pickle.loads(pickle.dumps(preset)), id="unpickled"),
        pytest.param(copy.deepcopy, id="copied"),
    ],
)
def test_the_first_use_of_a_preset_may_be_compiled(prepare, backend, rng):
    torch._dynamo.reset()
    q, k, v = qkv(rng)
    preset = prepare(unused_preset())
    compiled = torch.compile(lambda *qkv: psa_attention(*qkv, preset, grid=GRID), backend=backend, fullgraph=True)
    assert torch.equal(compiled(q, k, v), psa_attention(q, k, v, preset, grid=GRID))


def test_a_preset_by_name_compiles(rng):
    torch._dynamo.reset()
    q, k, v = qkv(rng)
    compiled = torch.compile(lambda *qkv: psa_attention(*qkv, grid=GRID), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), psa_attention(q, k, v, grid=GRID))


def test_a_preset_may_be_made_by_compiled_code(rng):
    torch._dynamo.reset()
    q, k, v = qkv(rng)
    call = lambda *qkv: psa_attention(*qkv, unused_preset("sampled_max"), grid=GRID)  # noqa: E731
    assert torch.equal(torch.compile(call, backend="eager")(q, k, v), call(q, k, v))


def test_gradients_flow_through_the_torch_stages(rng):
    q, k, v = (x.double().requires_grad_() for x in qkv(rng, tokens=96))
    preset = PRESET.replace(block_size={"m": 16, "n": 16}, key_variance=True, value_tilt=True)
    run = lambda q, k, v: psa_attention(q, k, v, preset, grid=(2, 6, 8))  # noqa: E731
    assert torch.autograd.gradcheck(lambda v: run(q.detach(), k.detach(), v)[..., ::5, ::4], (v,), fast_mode=True)
    run(q, k, v).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_whichever_input_requires_a_gradient_gets_it(which, rng):
    inputs = list(qkv(rng, tokens=96))
    inputs[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass"):
        psa_attention(*inputs, PRESET, grid=(2, 6, 8), backend="triton")
    psa_attention(*inputs, PRESET, grid=(2, 6, 8)).square().sum().backward()
    assert inputs[which].grad.abs().max() > 0


def test_a_gain_that_is_sampled_scales_the_gradient_of_the_tilt(rng):
    q, k, v = (x.double() for x in qkv(rng, tokens=96))
    layout = flat_layout(96, 16, 16, q.device)
    k.requires_grad_()
    pyramid = reference.build_pyramid(k, v, layout, (1, 4), value_tilt=True)
    fitted = reference.fit_tilt(pyramid, q, k, v, layout, 0.25)
    gain = tilt_gain(q, k, v, layout, 0.25)
    got, plain = (
        torch.autograd.grad(x.covariance.square().sum() / 2, k, retain_graph=True)[0] for x in (fitted, pyramid)
    )
    assert plain.abs().max() > 0
    torch.testing.assert_close(
        got, gain[:, :, None, None].square() * plain, rtol=0, atol=1e-14 * float(plain.abs().max())
    )


def test_a_gpu_without_triton_is_told_once(caplog):
    from psa_diffusers.attention import say_once

    with caplog.at_level(logging.WARNING, "psa_diffusers"):
        for _ in range(2):
            say_once("psa_attention runs on the plain torch stages: for the test")
    assert len(caplog.records) == 1
