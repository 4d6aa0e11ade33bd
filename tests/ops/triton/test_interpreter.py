"""Every Triton kernel in Triton's interpreter, against the float64 oracle and the torch stages.

bfloat16 is left to a GPU: the interpreter computes noise in it.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from budget import assert_within_budget

from psa_diffusers import PSAPreset, list_presets, load_preset, psa_attention, pyramid_attention
from psa_diffusers.ops import reference
from psa_diffusers.ops import triton as triton_backend
from psa_diffusers.ops.layout import flat_layout, make_layout
from psa_diffusers.ops.orders import video_order
from psa_diffusers.ops.types import LevelRule

# numpy, in the interpreter, announces the logarithm of 0 and NaN, which are meant here
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

ALL = (0, 1, 2, 4, 8, 16, 32, 64, 128)
CPU = torch.device("cpu")
BOTH = (triton_backend, reference)

CASES = [
    #             B  H  L     D    m    n    factors            terms           dtype
    pytest.param(1, 1, 1, 16, 32, 32, (1, 2, 32), (True, True), torch.float32, id="one-token"),
    pytest.param(1, 2, 63, 16, 32, 32, ALL[:7], (False, False), torch.float32, id="63-plain"),
    pytest.param(1, 2, 63, 16, 32, 32, ALL[:7], (True, False), torch.float16, id="63-key-variance-half"),
    pytest.param(2, 1, 97, 24, 32, 64, ALL[:8], (False, True), torch.float32, id="97-value-tilt-head-24"),
    pytest.param(1, 1, 97, 64, 64, 32, ALL[:7], (True, True), torch.float16, id="97-both-half"),
    pytest.param(1, 2, 130, 16, 64, 32, (0, 1, 4, 32), (True, True), torch.float32, id="130-empty-factors"),
    pytest.param(1, 1, 130, 96, 32, 128, ALL, (True, True), torch.float32, id="130-head-96-all-factors"),
    pytest.param(1, 1, 130, 128, 128, 64, ALL[:8], (False, True), torch.float16, id="130-head-128-half"),
    pytest.param(1, 1, 416, 16, 128, 128, (128,), (True, True), torch.float32, id="416-coarsest-only"),
    pytest.param(1, 1, 416, 64, 128, 64, (1, 8, 64), (True, False), torch.float32, id="416-three-factors"),
    pytest.param(1, 1, 416, 16, 64, 64, (1,), (True, True), torch.float32, id="416-dense"),
    pytest.param(1, 1, 1000, 16, 128, 128, ALL, (True, True), torch.float32, id="1000-all-factors"),
    pytest.param(1, 1, 1000, 32, 64, 128, ALL, (False, False), torch.float16, id="1000-all-factors-half"),
]


def random_qkv(rng, *shape, dtype=torch.float32):
    return tuple(torch.randn(*shape, generator=rng).to(dtype) for _ in range(3))


def random_map(rng, shape, factors):
    return torch.tensor(factors, dtype=torch.int16)[torch.randint(0, len(factors), shape, generator=rng)]


def check(q, k, v, **case):
    truth = oracle.oracle_attention(q, k, v, **case)
    rounded = pyramid_attention(q, k, v, backend="torch", **case)
    actual = pyramid_attention(q, k, v, backend="triton", **case)
    assert_within_budget(actual, truth, rounded)
    return actual


@pytest.mark.parametrize(("B", "H", "L", "D", "m", "n", "factors", "terms", "dtype"), CASES)
def test_attention_is_the_definition(B, H, L, D, m, n, factors, terms, dtype, rng):
    q, k, v = random_qkv(rng, B, H, L, D, dtype=dtype)
    level_map = random_map(rng, (B, H, -(-L // m), -(-L // n)), factors)
    check(q, k, v, level_map=level_map, block_m=m, block_n=n, key_variance=terms[0], value_tilt=terms[1])


@pytest.mark.parametrize("n", [32, 64, 128])
@pytest.mark.parametrize("factor", ALL[1:])
def test_every_factor_of_every_block_size(factor, n, rng):
    if factor > n:
        factor = n
    q, k, v = random_qkv(rng, 1, 1, 2 * n + 5, 16)
    level_map = torch.full((1, 1, -(-(2 * n + 5) // 64), 3), factor, dtype=torch.int16)
    check(q, k, v, level_map=level_map, block_m=64, block_n=n, key_variance=True, value_tilt=True)


def test_rows_that_keep_one_block_or_none(rng):
    q, k, v = random_qkv(rng, 1, 1, 200, 16)
    level_map = torch.zeros(1, 1, 4, 4, dtype=torch.int16)
    level_map[0, 0, 1, 2], level_map[0, 0, 2, 3] = 1, 8
    out = check(q, k, v, level_map=level_map, block_m=64, block_n=64, key_variance=True, value_tilt=True)
    assert (out[:, :, :64] == 0).all()


def test_zero_query_gives_the_plain_mean_of_v(rng):
    q, k, v = random_qkv(rng, 1, 2, 97, 16)
    level_map = random_map(rng, (1, 2, 2, 4), ALL[1:7])
    out = pyramid_attention(q * 0, k, v, level_map, block_m=64, block_n=32, backend="triton")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))


def test_a_skipped_block_changes_no_bit(rng):
    q, k, v = random_qkv(rng, 1, 1, 130, 16)
    level_map = random_map(rng, (1, 1, 3, 5), ALL[1:7])
    level_map[..., 2] = 0
    broken = [x.clone() for x in (k, v)]
    broken[0][:, :, 64:96], broken[1][:, :, 64:96] = torch.nan, torch.inf
    case = {"level_map": level_map, "block_m": 64, "block_n": 32, "key_variance": True, "backend": "triton"}
    assert torch.equal(pyramid_attention(q, k, v, **case), pyramid_attention(q, *broken, **case))


def test_views_are_read_in_place(rng):
    views = [torch.randn(2, 97, 3, 40, generator=rng)[..., 8:24].transpose(1, 2) for _ in range(3)]
    level_map = random_map(rng, (2, 3, 4, 4), (0, 1, 4))
    case = {"level_map": level_map, "block_m": 32, "block_n": 32, "value_tilt": True, "backend": "triton"}
    assert torch.equal(pyramid_attention(*views, **case), pyramid_attention(*(x.contiguous() for x in views), **case))


@pytest.mark.parametrize(
    ("text_tokens", "text_first", "order", "importance", "mode", "sim"),
    [
        (0, True, "Gilbert", "pooled_mass", "topk", False),
        (17, True, "boxes", "pooled_moments", "topk", False),
        (17, True, "boxes", "sampled_max", "thresholdbound", False),
        (17, False, "tiles", "pooled_mass", "thresholdbound", True),
        (226, True, "Gilbert", "sampled_max", "topk", True),
        (226, False, "Gilbert", "pooled_mass", "topk", False),
    ],
)
def test_the_whole_flow_reads_what_its_schedule_says(text_tokens, text_first, order, importance, mode, sim, rng):
    preset = PSAPreset(
        rearrange_method=order,
        block_size={"m": 32, "n": 16, "tile_n": 16},
        mask_ratios={1: [0, 0.2], 2: [0.2, 0.4], 8: [0.4, 0.7], 0: [0.7, 1]},
        mask_mode=mode,
        importance=importance,
        use_sim_mask=sim,
        key_variance=True,
        value_tilt=True,
        tile_size=(2, 2, 3),
    )
    q, k, v = random_qkv(rng, 1, 2, 105 + text_tokens, 16)
    where = {"grid": (3, 5, 7), "text_tokens": text_tokens, "text_first": text_first, "return_schedule": True}
    out, schedule = psa_attention(q, k, v, preset, backend="triton", **where)
    plain, expected = psa_attention(q, k, v, preset, backend="torch", **where)
    assert torch.equal(schedule.to_level_map(), expected.to_level_map())
    video = video_order((3, 5, 7), order.lower(), (2, 2, 3)) + (text_tokens if text_first else 0)
    text = torch.arange(text_tokens) + (0 if text_first else 105)
    case = {"level_map": schedule.to_level_map(), "block_m": 32, "block_n": 16}
    case |= {"key_variance": True, "value_tilt": True}
    truth = oracle.oracle_attention(q, k, v, order=torch.cat([video, text]), segments=[105, text_tokens], **case)
    assert_within_budget(out, truth, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_broken_numbers_come_out_where_dense_attention_has_them(name, value, rng):
    tensors = dict(zip("qkv", random_qkv(rng, 1, 2, 96, 16), strict=True))
    tensors[name][0, 1, 50, 3] = value
    preset = PSAPreset(
        block_size={"m": 16, "n": 16}, mask_ratios={1: [0, 0.2], 4: [0.2, 1]}, key_variance=True, value_tilt=True
    )
    out = psa_attention(**tensors, preset=preset, grid=(4, 4, 6), backend="triton")
    dense = torch.nn.functional.scaled_dot_product_attention(*(tensors[n].double() for n in "qkv"))
    assert torch.equal(out.isnan(), dense.isnan())


# pairs and steps of four and eight; four and sixteen; all tokens of a block at once
@pytest.mark.parametrize("factors", [(1, 2, 8, 64), (1, 4, 64), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pyramid_is_that_of_the_stage(dtype, factors, rng):
    _, k, v = random_qkv(rng, 1, 2, 150, 24, dtype=dtype)
    layout = make_layout((2, 7, 10), 10, True, 32, 64, "gilbert", (2, 8, 8), CPU)
    terms = {"key_variance": True, "value_tilt": True}
    ours, theirs = (backend.build_pyramid(k, v, layout, factors, **terms) for backend in BOTH)
    assert ours.bases == theirs.bases
    real = torch.isfinite(theirs.log_counts)
    torch.testing.assert_close(ours.log_counts[real], theirs.log_counts[real])
    assert (ours.log_counts[~real] == -torch.inf).all()
    for name in ("keys", "values", "variance"):
        torch.testing.assert_close(getattr(ours, name)[:, :, real], getattr(theirs, name)[:, :, real])
    # the kernel's products take factors of the dtype of k and v
    precision = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=precision, atol=precision)
    assert torch.equal(ours.finite, theirs.finite)


@pytest.mark.parametrize("unit", ["mma", "wgmma"])
def test_covariances_of_many_parts_are_those_of_the_stage(unit, rng, monkeypatch):
    """Parts of each factor, pairs of tokens and of cells, and two wider steps that share a launch."""
    from psa_diffusers.ops.triton import pyramid, tuning

    monkeypatch.setattr(tuning, "matrix_unit", lambda device: unit)
    monkeypatch.setattr(pyramid, "_COVARIANCE_ROWS", 512)
    _, k, v = random_qkv(rng, 1, 2, 1500, 24, dtype=torch.float16)
    layout = flat_layout(1500, 64, 64, CPU)
    ours, theirs = (
        backend.build_pyramid(k, v, layout, (1, 2, 4, 16, 64), value_tilt=True).covariance for backend in BOTH
    )
    precision = 8 * torch.finfo(k.dtype).eps  # the kernel's products take factors of the dtype of k and v
    torch.testing.assert_close(ours, theirs, rtol=precision, atol=precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "n", "dim"), [(32, 16, 24), (128, 128, 16)])
def test_gain_of_the_tilt_is_the_definition(m, n, dim, dtype, rng):
    heads = torch.tensor([0.3, 3.0, 20.0])[:, None, None]  # from linear to saturated
    q, k, v = random_qkv(rng, 1, 3, 1130, dim)
    q, k, v = (x.to(dtype) for x in (q * heads, k, v + k + 3))  # a mean that the shift must not see
    layout = make_layout((5, 15, 15), 5, True, m, n, "gilbert", (1, 1, 1), CPU)
    pyramid = replace(reference.build_pyramid(k, v, layout, (1, n)), covariance=torch.ones(1, 3, 2, dim, dim))
    fitted = triton_backend.fit_tilt(pyramid, q, k, v, layout, 0.25)
    order = [*(video_order((5, 15, 15), "gilbert") + 5).tolist(), *range(5)]
    truth = oracle.oracle_tilt_gain(q, k, v, n, scale=0.25, order=order, video_tokens=1125)
    # the kernel's products take factors of the dtype of q, k and v
    torch.testing.assert_close(
        fitted.covariance.double(), truth[:, :, None, None, None].expand_as(fitted.covariance),
        rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "n", "dim"),
    [
        pytest.param(9000, 32, 16, id="many blocks and queries"),
        pytest.param(32 * 16 + 5, 16, 16, id="the last sampled block is short"),
        pytest.param(16 * 128 + 77, 128, 64, id="a block is several tiles, the last one is short"),
    ],
)
def test_gain_of_the_tilt_is_that_of_the_stage(tokens, n, dim, rng):
    q, k, v = random_qkv(rng, 2, 2, tokens, dim)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v + k))
    layout = flat_layout(tokens, 64, n, CPU)
    pyramid = reference.build_pyramid(k, v, layout, (1, n), value_tilt=True)
    ours, theirs = (backend.fit_tilt(pyramid, q, k, v, layout, 0.25) for backend in BOTH)
    assert not torch.equal(theirs.covariance, pyramid.covariance), "the gain must be below 1"
    torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gain_of_the_tilt_ignores_what_is_not_finite(name, rng):
    tensors = dict(zip("qkv", random_qkv(rng, 1, 2, 1130, 16), strict=True))
    layout = flat_layout(1130, 32, 32, CPU)
    pyramid = reference.build_pyramid(tensors["k"], tensors["v"], layout, (1, 32), value_tilt=True)
    tensors["v"] = tensors["v"] + tensors["k"]
    tensors[name][:, 1, 512] = torch.nan
    ours, theirs = (backend.fit_tilt(pyramid, **tensors, layout=layout, scale=0.25) for backend in BOTH)
    torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factors", [None, (1, 2, 16), (1, 2)], ids=["tokens", "a factor of 16", "cells of 16"])
@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments", "sampled_max"])
@pytest.mark.parametrize(("m", "n"), [(32, 32), (64, 16), (16, 128)])
def test_importance_is_the_definition(method, m, n, factors, rng):
    q, k, v = random_qkv(rng, 1, 2, 150, 16)
    layout = make_layout((2, 7, 10), 10, True, m, n, "raster", (1, 1, 1), CPU)
    truth = oracle.oracle_importance(q, k, method, m, n, order=[*range(10, 150), *range(10)], segments=[140, 10])
    pyramid = triton_backend.build_pyramid(k, v, layout, factors, key_variance=True) if factors else None
    assert factors != (1, 2) or pyramid.cells is not None
    actual = triton_backend.block_importance(q, k, layout, method, 0.25, pyramid)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-6)  # a few roundings of float32


@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments", "sampled_max"])
def test_importance_is_that_of_the_stage_whatever_the_number_of_programs(method, rng, monkeypatch):
    from psa_diffusers.ops.triton import importance

    width = 45 if method == "sampled_max" else 93  # more key blocks than are read back at a time
    q, k, _ = random_qkv(rng, 1, 2, 50 * (width + 1), 16)
    q[0, 1, 702] = torch.nan  # the first head is of finite numbers, and what it noted is written over
    layout = make_layout((1, 50, width), 50, True, 128, 128, "raster", (1, 1, 1), CPU)
    ours = triton_backend.block_importance(q, k, layout, method, 0.25)
    monkeypatch.setattr(importance, "_programs", lambda device: 3)
    other = triton_backend.block_importance(q, k, layout, method, 0.25)
    assert torch.isnan(ours).any(-1).sum() == torch.isnan(ours).all(-1).sum() == 1
    torch.testing.assert_close(ours, reference.block_importance(q, k, layout, method, 0.25), equal_nan=True)
    assert torch.equal(ours.nan_to_num(-1), other.nan_to_num(-1))


@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments", "sampled_max"])
def test_a_negative_scale_is_that_of_negative_queries(method, rng):
    q, k, _ = random_qkv(rng, 1, 2, 150, 16)
    layout = flat_layout(150, 32, 32, CPU)
    assert torch.equal(*(triton_backend.block_importance(s * q, k, layout, method, s * 0.25) for s in (1, -1)))


@pytest.mark.parametrize("scale", [0.0, 1e-40, -1e-46])
@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments"])
def test_with_no_scale_a_block_weighs_what_it_has_of_the_tokens(method, scale, rng):
    q, k, _ = random_qkv(rng, 1, 1, 150, 16)
    layout = flat_layout(150, 32, 32, CPU)
    ours = triton_backend.block_importance(q, k, layout, method, scale)
    shares = torch.tensor([32, 32, 32, 32, 22]) / 150
    torch.testing.assert_close(ours, shares.expand_as(ours), rtol=1e-5, atol=1e-6)  # a few roundings of float32


@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments", "sampled_max"])
def test_another_scale_leaves_nothing_behind(method, rng):
    """What is remembered of a layout outlives the call: it must not grow with what a user varies."""
    from psa_diffusers.ops.triton import launch

    q, k, _ = random_qkv(rng, 1, 1, 64, 16)
    layout = flat_layout(64, 32, 32, CPU)
    triton_backend.block_importance(q, k, layout, method, 0.25)
    before = set(launch._KNOWN[layout])
    triton_backend.block_importance(q, k, layout, method, 0.5)
    assert set(launch._KNOWN[layout]) == before


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments", "sampled_max"])
def test_importance_in_the_tiles_of_hopper_is_that_of_the_stage(method, dim, rng, monkeypatch):
    from psa_diffusers.ops.triton import tuning

    monkeypatch.setattr(tuning, "matrix_unit", lambda device: "wgmma")
    q, k, _ = random_qkv(rng, 1, 1, 700, dim, dtype=torch.float16)
    layout = flat_layout(700, 64, 64, CPU)
    ours, theirs = (backend.block_importance(q, k, layout, method, dim**-0.5) for backend in BOTH)
    # a channel of a cell may round either way
    torch.testing.assert_close(ours, theirs, rtol=8 * torch.finfo(q.dtype).eps, atol=1e-6)


def test_the_shape_of_the_keys_is_that_of_all_of_them(rng):
    q, k, _ = random_qkv(rng, 1, 1, 1600, 16)
    k = k * torch.linspace(-1, 1, 1600)[:, None].mul(torch.linspace(-2, 2, 16)).exp()  # turns from token to token
    layout = flat_layout(1600, 32, 32, CPU)
    ours, theirs = (backend.block_importance(q, k, layout, "pooled_moments", 0.1) for backend in BOTH)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # a few roundings of float32


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("N", [1, 7, 40])
def test_levels_are_those_of_the_stage(N, capped, mode, rng):
    layout = flat_layout(16 * N, 128, 16, CPU)
    M = layout.num_query_blocks
    # multiples of 1/64 add up exactly, so that bounds are crossed at the same block in any arithmetic; many ties
    importance = torch.randint(0, 5, (1, 2, M, N), generator=rng) / 64 + (torch.arange(N) == N // 2) / 64
    importance[0, 1, 0, 0] = torch.nan
    cap = torch.tensor([1, 2, 8], dtype=torch.int16)[torch.randint(0, 3, (1, 2, N), generator=rng)] if capped else None
    finite = torch.tensor([[True, True]])
    for levels in (((1, 0.1), (2, 0.3), (8, 0.6), (0, 1.0)), ((1, 0.25), (4, 1.0)), ((8, 0.5), (0, 1.0)), ((1, 1.0),)):
        ours, theirs = (
            backend.assign_block_levels(importance, layout, LevelRule(levels, mode, 0.06), cap=cap, finite=finite)
            for backend in BOTH
        )
        assert torch.equal(ours, theirs)


# what a rule by rank may look like at its edges
EDGES = (
    ((1, 0.1), (2, 0.15), (8, 0.35), (0, 1.0)),
    ((1, 1.0),),
    ((8, 0.5), (0, 1.0)),
    ((1, 0.001), (2, 0.002), (16, 1.0)),
    ((1, 0.25), (2, 0.26), (8, 1.0)),  # of 17 blocks both end at the fourth
)


def published_levels():
    """Every rule by rank of the preset file."""
    found = {
        (preset.levels, preset.factors)
        for section in list_presets()
        for preset in (load_preset(section, name) for name in list_presets(section))
        if preset.type == "psa" and preset.mask_mode == "topk"
    }
    return sorted(found)


def test_lists_by_every_published_rule_are_those_of_the_stages(rng):
    importance = torch.rand(1, 1, 2, 139, generator=rng)
    layout = flat_layout(139 * 16, 16, 16, CPU)
    layout = replace(layout, query_counts=torch.full((2,), 16, dtype=torch.int32), video_query_blocks=2)
    for levels, factors in published_levels():
        rule = LevelRule(levels, "topk")
        assert_same_lists(*(backend.plan_blocks(importance, layout, rule, factors) for backend in BOTH))


def hard_rows(N, rng):
    """Importance ``[1, 1, 12, N]``: a row of each kind that a selection can stumble over."""
    rows = torch.rand(12, N, generator=rng) ** 8
    rows[1] = torch.randint(0, 4, (N,), generator=rng) / 8  # ties everywhere
    rows[2] = 0.5  # nothing but ties
    rows[3] = 0
    rows[4, : N // 2] = -0.0  # equal to the other half
    rows[4, N // 2 :] = 0.0
    rows[5] = -rows[5]
    rows[6] = rows[6] * 2.0**-126  # subnormal
    rows[7] = torch.where(torch.arange(N) % 2 == 0, 3e38, -3e38)  # the sum of two does not fit
    rows[8, N // 2] = torch.nan
    rows[9, -1] = torch.inf
    rows[10, 0] = -torch.inf
    rows[11] = torch.arange(N).flip(0)
    return rows[None, None]


def assert_same_lists(ours, theirs):
    assert torch.equal(ours.offsets, theirs.offsets)
    assert ours.block_ids.dtype == theirs.block_ids.dtype
    kept = torch.arange(ours.block_ids.shape[-1]) < ours.offsets[..., -1:]
    assert torch.equal(torch.where(kept, ours.block_ids, 0), torch.where(kept, theirs.block_ids, 0))


@pytest.mark.parametrize("N", [1, 2, 17, 591])
def test_lists_by_rank_are_those_of_the_stages(N, rng):
    importance = hard_rows(N, rng)
    layout = flat_layout(16 * N, 16, 16, CPU)
    layout = replace(layout, query_counts=torch.full((12,), 16, dtype=torch.int32), video_query_blocks=11)
    for levels in EDGES:
        rule = LevelRule(levels, "topk")
        assert_same_lists(*(backend.plan_blocks(importance, layout, rule, (1, 2, 8, 16)) for backend in BOTH))
    assert torch.equal(*(backend.assign_block_levels(importance, layout, rule) for backend in BOTH))


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_lists_with_caps_text_and_a_broken_head_are_those_of_the_stages(mode, rng):
    layout = make_layout((1, 16, 17), 37, True, 64, 16, "raster", (1, 1, 1), CPU)
    shape = (2, 2, layout.num_query_blocks, layout.num_key_blocks)
    importance = torch.randint(0, 9, shape, generator=rng) / 64
    cap = torch.tensor([1, 2, 4, 8], dtype=torch.int16)[torch.randint(0, 4, (2, 2, shape[3]), generator=rng)]
    case = {"cap": cap, "finite": torch.tensor([[True, False], [True, True]])}
    rule = LevelRule(((1, 0.1), (2, 0.3), (8, 0.6), (0, 1.0)), mode)
    assert_same_lists(*(backend.plan_blocks(importance, layout, rule, (1, 2, 4, 8), **case) for backend in BOTH))


def test_the_longest_rows(rng):
    from psa_diffusers.ops.triton.levels import MAX_BLOCKS

    importance = hard_rows(MAX_BLOCKS, rng)[:, :, [0, 1, 8]]
    layout = flat_layout(16 * MAX_BLOCKS, 16, 16, CPU)
    layout = replace(layout, query_counts=torch.full((3,), 16, dtype=torch.int32), video_query_blocks=3)
    # the second rule fills one of two counts that share a number
    for levels in (((1, 0.095), (4, 0.225), (16, 0.385), (128, 1.0)), ((4, 1.0),)):
        rule = LevelRule(levels, "topk")
        assert_same_lists(*(backend.plan_blocks(importance, layout, rule, (1, 4, 16, 128)) for backend in BOTH))


@pytest.mark.parametrize("N", [1023, 1024])
def test_a_factor_may_have_all_blocks_of_a_row(N):
    """Counts of several factors share a number: that of one fills its share, and must not run into the next."""
    for factor in (1, 4, 16):
        level_map = torch.full((1, 1, 1, N), factor, dtype=torch.int16)
        ours, theirs = (backend.make_schedule(level_map, (1, 4, 16), 16) for backend in BOTH)
        assert_same_lists(ours, theirs)


def test_rows_that_are_too_long_are_refused():
    from psa_diffusers.ops.triton.levels import MAX_BLOCKS

    with pytest.raises(ValueError, match=f"at most {MAX_BLOCKS} key blocks a row, got {MAX_BLOCKS + 1} of 16 tokens"):
        triton_backend.make_schedule(torch.ones(1, 1, 1, MAX_BLOCKS + 1, dtype=torch.int16), (1,), 16)


def test_a_head_that_is_not_finite_reads_everything(rng):
    layout = flat_layout(160, 32, 16, CPU)
    importance = torch.rand(1, 2, 5, 10, generator=rng)
    rule = LevelRule(((1, 0.1), (0, 1.0)), "topk")
    level_map = triton_backend.assign_block_levels(importance, layout, rule, finite=torch.tensor([[True, False]]))
    assert (level_map[0, 1] == 1).all()
    assert (level_map[0, 0] == 0).any()


@pytest.mark.parametrize("L", [64, 97])
def test_cosine_cap_is_the_definition(L, rng):
    runs = [torch.randn(1, 2, 16 // run, 16, generator=rng).repeat_interleave(run, 2) for run in (1, 2, 4, 8, 16, 2, 4)]
    k = torch.cat(runs, 2)[:, :, :L] + 0.1 * torch.randn(1, 2, L, 16, generator=rng)
    thresholds = ((2, 0.7), (4, 0.65), (8, 0.6))
    actual = triton_backend.key_cosine_cap(k, flat_layout(L, 16, 16, CPU), thresholds)
    assert torch.equal(actual.long(), oracle.oracle_cosine_cap(k, 16, thresholds))


def test_schedule_is_that_of_the_stage(rng):
    level_map = random_map(rng, (2, 2, 5, 9), (0, 1, 4, 8))
    ours, theirs = (backend.make_schedule(level_map, (1, 4, 8), 16) for backend in BOTH)
    assert_same_lists(ours, theirs)
    assert torch.equal(ours.to_level_map(), level_map)


@pytest.mark.skipif(sys.platform != "linux", reason="the walls around tensors are those of Linux")
def test_nothing_is_read_or_written_out_of_bounds():
    script = Path(__file__).with_name("memcheck.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
