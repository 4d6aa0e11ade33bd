"""Every torch stage against the float64 oracle."""

import oracle
import pytest
import torch
from budget import assert_within_rounding, max_error

from psa_diffusers import assign_levels, load_preset, psa_attention, pyramid_attention
from psa_diffusers.ops.layout import flat_layout, make_layout
from psa_diffusers.ops.orders import video_order
from psa_diffusers.ops.reference import (
    block_importance,
    build_pyramid,
    fit_tilt,
    key_cosine_cap,
    make_schedule,
)
from psa_diffusers.ops.reference.levels import assign_ranked_levels
from psa_diffusers.ops.reference.tilt import tilt_gain
from psa_diffusers.ops.types import LevelRule
from psa_diffusers.presets import PSAPreset

ALL_FACTORS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

CASES = [
    #             B  H  L     D   m    n    factors              what it is for
    pytest.param(1, 1, 1, 16, 32, 32, (1, 2, 32), id="one-token"),
    pytest.param(1, 2, 63, 16, 32, 32, ALL_FACTORS[:7], id="ragged-63"),
    pytest.param(2, 1, 97, 24, 32, 64, ALL_FACTORS[:8], id="one-real-token-in-the-tail"),
    pytest.param(1, 2, 130, 16, 64, 32, (0, 1, 4, 32), id="empty-factors"),
    pytest.param(1, 1, 130, 64, 128, 128, (128,), id="coarsest-only"),
    pytest.param(1, 1, 416, 96, 128, 64, (1, 8, 64), id="three-factors"),
    pytest.param(1, 1, 1000, 16, 128, 128, ALL_FACTORS, id="all-factors"),
    pytest.param(1, 1, 416, 128, 64, 128, ALL_FACTORS, id="wide-head"),
]
TERMS = [
    pytest.param(False, False, id="plain"),
    pytest.param(True, False, id="key-variance"),
    pytest.param(False, True, id="value-tilt"),
    pytest.param(True, True, id="both-terms"),
]


def random_qkv(rng, *shape, dtype=torch.float32):
    return tuple(torch.randn(*shape, generator=rng).to(dtype) for _ in range(3))


def random_map(rng, B, H, M, N, factors):
    return torch.tensor(factors, dtype=torch.int16)[torch.randint(0, len(factors), (B, H, M, N), generator=rng)]


@pytest.mark.parametrize(("key_variance", "value_tilt"), TERMS)
@pytest.mark.parametrize(("B", "H", "L", "D", "m", "n", "factors"), CASES)
def test_attention_is_the_definition(B, H, L, D, m, n, factors, key_variance, value_tilt, rng):
    q, k, v = random_qkv(rng, B, H, L, D)
    level_map = random_map(rng, B, H, -(-L // m), -(-L // n), factors)
    case = {"level_map": level_map, "block_m": m, "block_n": n, "key_variance": key_variance, "value_tilt": value_tilt}
    truth = oracle.oracle_attention(q, k, v, **case)
    exact = pyramid_attention(q.double(), k.double(), v.double(), backend="torch", **case)
    assert max_error(exact, truth) <= 1e-13 * float(truth.abs().max() + 1), "a few hundred roundings of float64"
    assert_within_rounding(pyramid_attention(q, k, v, backend="torch", **case), truth, q, k, v, **case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("key_variance", "value_tilt"), TERMS)
def test_half_precision_stays_within_its_rounding(key_variance, value_tilt, dtype, rng):
    q, k, v = random_qkv(rng, 1, 2, 130, 32, dtype=dtype)
    case = {"level_map": random_map(rng, 1, 2, 3, 5, ALL_FACTORS[:7]), "block_m": 64, "block_n": 32}
    case |= {"key_variance": key_variance, "value_tilt": value_tilt}
    truth = oracle.oracle_attention(q, k, v, **case)
    assert_within_rounding(pyramid_attention(q, k, v, backend="torch", **case), truth, q, k, v, **case)


@pytest.mark.parametrize("text_first", [True, False], ids=["text-in-front", "text-at-the-back"])
@pytest.mark.parametrize("text_tokens", [0, 17, 226])
@pytest.mark.parametrize("order", ["raster", "gilbert", "tiles", "boxes"])
def test_the_whole_flow_reads_what_its_schedule_says(order, text_tokens, text_first, rng):
    grid, m, n = (3, 5, 7), 32, 16
    preset = PSAPreset(
        use_rearrange=order != "raster",
        rearrange_method={"raster": "Gilbert", "gilbert": "Gilbert"}.get(order, order),
        block_size={"m": m, "n": n, "tile_n": 16},
        mask_ratios={1: [0, 0.2], 2: [0.2, 0.4], 8: [0.4, 0.7], 0: [0.7, 1]},
        key_variance=True,
        value_tilt=True,
        tile_size=(2, 2, 3),
    )
    q, k, v = random_qkv(rng, 1, 2, 105 + text_tokens, 16)
    out, schedule = psa_attention(
        q,
        k,
        v,
        preset,
        grid=grid,
        text_tokens=text_tokens,
        text_first=text_first,
        backend="torch",
        return_schedule=True,
    )
    level_map = schedule.to_level_map()
    video = video_order(grid, order, (2, 2, 3)) + (text_tokens if text_first else 0)
    text = torch.arange(text_tokens) + (0 if text_first else 105)
    case = {"level_map": level_map, "block_m": m, "block_n": n, "key_variance": True, "value_tilt": True}
    case |= {"order": torch.cat([video, text]), "segments": [105, text_tokens]}
    assert_within_rounding(out, oracle.oracle_attention(q, k, v, **case), q, k, v, **case)
    video_rows, video_columns = 4, 7
    assert (level_map[:, :, video_rows:] == 1).all(), "a text query reads everything in full"
    assert (level_map[..., video_columns:] == 1).all(), "text keys are read in full by every query"
    assert (level_map[:, :, :video_rows, :video_columns] == 0).any()


def test_views_are_read_in_place(rng):
    dense = [torch.randn(2, 97, 3, 16, generator=rng) for _ in range(3)]  # [B, L, H, D], as diffusers has it
    views = [x.transpose(1, 2) for x in dense]
    level_map = random_map(rng, 2, 3, 4, 4, (0, 1, 4))
    kwargs = {"block_m": 32, "block_n": 32, "value_tilt": True, "backend": "torch"}
    out = pyramid_attention(*views, level_map, **kwargs)
    assert torch.equal(out, pyramid_attention(*(x.contiguous() for x in views), level_map, **kwargs))
    assert out.transpose(1, 2).is_contiguous(), "the result goes back to [B, L, H, D] without a copy"
    spread = [torch.randn(2, 97, 3, 40, generator=rng)[..., 8:24].transpose(1, 2) for _ in range(3)]
    out = pyramid_attention(*spread, level_map, **kwargs)
    assert torch.equal(out, pyramid_attention(*(x.contiguous() for x in spread), level_map, **kwargs))


@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments", "sampled_max"])
@pytest.mark.parametrize(("m", "n"), [(32, 32), (64, 16), (16, 64), (8, 8)])
def test_importance_is_the_definition(method, m, n, rng):
    q, k, _ = random_qkv(rng, 1, 2, 150, 16)
    layout = make_layout((2, 7, 10), 10, True, m, n, "raster", (1, 1, 1), q.device)
    order, segments = [*range(10, 150), *range(10)], [140, 10]
    truth = oracle.oracle_importance(q, k, method, m, n, order=order, segments=segments)
    actual = block_importance(q.double(), k.double(), layout, method, 0.25)
    assert max_error(actual, truth) < 1e-13
    assert max_error(block_importance(q, k, layout, method, 0.25), truth) < 1e-5


@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments"])
def test_pooled_mass_of_a_row_sums_to_one(method, rng):
    q, k, _ = random_qkv(rng, 1, 1, 130, 16)
    importance = block_importance(q, k, flat_layout(130, 64, 32, q.device), method, 0.25)
    torch.testing.assert_close(importance.sum(-1), torch.ones(1, 1, 3))


def test_moments_see_a_block_whose_keys_cancel(rng):
    # keys of block 8 point both ways along the query: their mean is 0, half of them score high
    k = 0.1 * torch.randn(1, 1, 512, 16, generator=rng)
    direction = torch.ones(16)
    k[:, :, 256:288] += 2 * direction * torch.tensor([1.0, -1.0]).repeat(16)[:, None]
    q = direction.expand(1, 1, 512, 16)
    layout = flat_layout(512, 32, 32, k.device)
    blind, seeing = (
        block_importance(q, k, layout, method, 0.25)[0, 0, 0] for method in ("pooled_mass", "pooled_moments")
    )
    assert blind[8] < 0.2
    assert seeing[8] > 0.9


def test_moments_are_bounded_and_equal_keys_have_none(rng):
    q, k, _ = random_qkv(rng, 1, 2, 192, 16)
    layout = flat_layout(192, 32, 32, k.device)
    wild = k.clone()
    wild[:, :, 7] = 1e4
    importance = block_importance(q, wild, layout, "pooled_moments", 0.25)
    assert torch.isfinite(importance).all()
    equal = k[:, :, ::16].repeat_interleave(16, 2)
    first = q[:, :, ::16].repeat_interleave(16, 2)
    torch.testing.assert_close(
        block_importance(first, equal, layout, "pooled_moments", 0.25),
        block_importance(first, equal, layout, "pooled_mass", 0.25),
    )


@pytest.mark.parametrize(("m", "n"), [(32, 16), (16, 64)])
def test_tilt_gain_is_the_definition(m, n, rng):
    q, k, v = random_qkv(rng, 1, 3, 1130, 16)
    q = q * torch.tensor([0.3, 3.0, 20.0])[:, None, None]  # from linear to saturated
    v = v + k  # values follow the keys
    layout = make_layout((5, 15, 15), 5, True, m, n, "gilbert", (1, 1, 1), q.device)
    q, k, v = (x[:, :, : 5 * 15 * 15 + 5] for x in (q, k, v))
    order = [*(video_order((5, 15, 15), "gilbert") + 5).tolist(), *range(5)]
    truth = oracle.oracle_tilt_gain(q, k, v, n, scale=0.25, order=order, video_tokens=1125)
    assert max_error(tilt_gain(q.double(), k.double(), v.double(), layout, 0.25), truth) < 1e-12
    assert max_error(tilt_gain(q, k, v, layout, 0.25), truth) < 1e-5
    assert truth[0, 0] > 1.5 * truth[0, 1] > 2 * truth[0, 2] > 0, "the case must tell heads apart"


def test_tilt_gain_ignores_what_is_not_finite(rng):
    q, k, v = random_qkv(rng, 1, 1, 1130, 16)
    layout = flat_layout(1130, 32, 32, q.device)
    clean = tilt_gain(q, k, v + k, layout, 0.25)
    q[:, :, 512] = torch.nan
    assert 0.5 < tilt_gain(q, k, v + k, layout, 0.25) / clean < 2
    k[:, :, 5] = torch.inf
    assert torch.isfinite(tilt_gain(q, k, v + k, layout, 0.25)).all()


def test_the_whole_flow_with_moments_and_a_fitted_tilt(rng):
    preset = PSAPreset(
        block_size={"m": 32, "n": 32},
        mask_ratios={1: [0, 0.1], 8: [0.1, 0.5], 32: [0.5, 1]},
        importance="pooled_moments",
        key_variance=True,
        value_tilt=True,
        tilt_gain="sampled",
    )
    q, k, v = random_qkv(rng, 1, 2, 330, 16)
    q, v = q * torch.tensor([1.0, 6.0])[:, None, None], v + k
    out, schedule = psa_attention(q, k, v, preset, backend="torch", return_schedule=True)
    gain = oracle.oracle_tilt_gain(q, k, v, 32)
    case = {"level_map": schedule.to_level_map(), "block_m": 32, "block_n": 32, "key_variance": True}
    truth = oracle.oracle_attention(q, k, v, value_tilt=True, tilt_gain=gain, **case)
    full = oracle.oracle_attention(q, k, v, value_tilt=True, **case)
    assert max_error(out, truth) < 1e-5 * float(truth.abs().max() + 1)
    assert max_error(full, truth) > 1e-2, "the gain must matter here"


def test_a_gain_scales_the_covariance_of_its_head_alone(rng):
    q, k, v = random_qkv(rng, 2, 3, 600, 16)
    layout = flat_layout(600, 32, 32, q.device)
    pyramid = build_pyramid(k, v + k, layout, (1, 4, 32), value_tilt=True)
    fitted, gain = fit_tilt(pyramid, q, k, v + k, layout, 0.25), tilt_gain(q, k, v + k, layout, 0.25)
    torch.testing.assert_close(fitted.covariance, pyramid.covariance * gain[:, :, None, None, None])
    assert fitted.keys is pyramid.keys


LEVELS = [
    pytest.param(((1, 0.1), (2, 0.3), (8, 0.6), (0, 1.0)), id="skipping"),
    pytest.param(((1, 0.25), (4, 1.0)), id="covering"),
    pytest.param(((8, 0.5), (0, 1.0)), id="no-full-interval"),
    pytest.param(((1, 1.0),), id="dense"),
]


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("N", [1, 7, 40])
def test_levels_are_the_definition(levels, mode, N, rng):
    # multiples of 1/64 add up exactly, so that bounds are crossed at the same block in any arithmetic; many ties
    importance = torch.randint(0, 5, (1, 2, 6, N), generator=rng) / 64 + (torch.arange(N) == N // 2) / 64
    actual = assign_ranked_levels(importance, LevelRule(levels, mode, 0.06))
    for row, expected in zip(actual.view(-1, N).tolist(), importance.view(-1, N).tolist(), strict=True):
        assert row == oracle.oracle_levels(expected, levels, mode)


def test_the_block_that_crosses_a_bound_belongs_to_the_finer_side():
    importance = torch.tensor([[[[0.5, 0.25, 0.125, 0.125]]]])
    ratios = {1: [0, 0.5], 2: [0.5, 0.6], 0: [0.6, 1]}
    # .5 reaches the first bound exactly, so the next block is past it; .75 crosses .6
    assert assign_levels(importance, ratios, "thresholdbound").tolist() == [[[[1, 2, 0, 0]]]]


def test_thresholdbound_keeps_its_least_share_in_full():
    importance = torch.tensor([1.0] + [0.0] * 99)[None, None, None]
    full = assign_levels(importance, {1: [0, 0.5], 0: [0.5, 1]}, "thresholdbound", min_full_ratio=0.06)
    assert (full == 1).sum() == 6
    assert (full[..., :6] == 1).all(), "ties break by index"


def test_topk_keeps_one_block_in_full():
    assert assign_levels(torch.rand(1, 1, 2, 5), {1: [0, 0.05], 0: [0.05, 1]}).sum(-1).tolist() == [[[1, 1]]]


def test_a_row_of_broken_importance_reads_everything():
    importance = torch.rand(1, 1, 2, 8)
    importance[..., 1, 3] = torch.nan
    levels = assign_levels(importance, {1: [0, 0.25], 0: [0.25, 1]})
    assert (levels == 1).sum(-1).tolist() == [[[2, 8]]]


@pytest.mark.parametrize("L", [64, 97])
def test_cosine_cap_is_the_definition(L, rng):
    # block after block, keys are alike in runs of 1, 2, 4, 8, 16, ...
    runs = [torch.randn(1, 2, 16 // run, 16, generator=rng).repeat_interleave(run, 2) for run in (1, 2, 4, 8, 16, 2, 4)]
    k = torch.cat(runs, 2)[:, :, :L] + 0.1 * torch.randn(1, 2, L, 16, generator=rng)
    thresholds = ((2, 0.7), (4, 0.65), (8, 0.6))
    actual = key_cosine_cap(k, flat_layout(L, 16, 16, k.device), thresholds)
    expected = oracle.oracle_cosine_cap(k, 16, thresholds)
    assert torch.equal(actual.long(), expected)
    assert set(expected.unique().tolist()) == {1, 2, 4, 8}, "the case must tell factors apart"


def test_use_sim_mask_lowers_factors_and_keeps_skips(rng):
    q, k, v = random_qkv(rng, 1, 1, 256, 16)
    preset = PSAPreset(block_size={"m": 16, "n": 16}, mask_ratios={1: [0, 0.1], 8: [0.1, 0.6], 0: [0.6, 1]})
    plain, capped = (
        psa_attention(q, k, v, p, backend="torch", return_schedule=True)[1].to_level_map()
        for p in (preset, preset.replace(use_sim_mask=True))
    )
    assert torch.equal(plain == 0, capped == 0)
    assert (capped <= plain).all()
    assert (capped < plain).any()


def test_schedule_and_level_map_are_inverse(rng):
    level_map = random_map(rng, 2, 2, 5, 9, (0, 1, 4, 8))
    schedule = make_schedule(level_map, (1, 4, 8), 16)
    assert torch.equal(schedule.to_level_map(), level_map)
    expected = sum((level_map == f).double().mean() / f for f in (1, 4, 8))
    assert schedule.density() == pytest.approx(float(expected))
    assert schedule.block_ids.dtype == torch.int16
    first = schedule.block_ids[0, 0, 0, : schedule.offsets[0, 0, 0, 1]]
    assert first.tolist() == (level_map[0, 0, 0] == 1).nonzero().flatten().tolist(), "ascending within a factor"


def test_pyramid_means_skip_empty_lanes():
    k = torch.arange(5.0)[None, None, :, None].expand(1, 1, 5, 16)
    pyramid = build_pyramid(k, k, flat_layout(5, 4, 4, k.device), (1, 2, 4), key_variance=True)
    # blocks 0 1 2 3 | 4 - - -
    assert pyramid.keys[0, 0, :, 0].tolist()[:3] == [0.5, 2.5, 4.0]
    assert pyramid.keys[0, 0, pyramid.bases[2] :, 0].tolist() == [1.5, 4.0]
    torch.testing.assert_close(pyramid.log_counts.exp(), torch.tensor([2.0, 2, 1, 0, 4, 1]))
    torch.testing.assert_close(pyramid.variance[0, 0, pyramid.bases[2] :], torch.tensor([1.25, 0]))


@pytest.mark.parametrize("name", ["psa_cover", "psa_fast", "psa_quality"])
@pytest.mark.parametrize(("grid", "text_tokens"), [((4, 8, 12), 0), ((5, 9, 11), 7)], ids=["even", "ragged-with-text"])
def test_our_presets_are_the_definition_from_start_to_end(name, grid, text_tokens, rng):
    video_tokens = grid[0] * grid[1] * grid[2]
    q, k, v = random_qkv(rng, 1, 2, video_tokens + text_tokens, 16, dtype=torch.float64)
    q, v = q * torch.tensor([1.0, 4.0])[:, None, None], v + k
    preset = load_preset("default", name)
    out, schedule = psa_attention(
        q, k, v, preset, grid=grid, text_tokens=text_tokens, backend="torch", return_schedule=True
    )
    m, n = 16 if name == "psa_fast" else 32, 32  # min_blocks: the least size of a block, as the video is small
    coarse = tuple((min(factor, n), bound) for factor, bound in preset.for_video(video_tokens).levels)
    video = video_order(grid, "boxes") + text_tokens
    place = {"order": torch.cat([video, torch.arange(text_tokens)]), "segments": [video_tokens, text_tokens]}
    importance = oracle.oracle_importance(q, k, "pooled_moments", m, n, **place)
    rows, blocks = -(-video_tokens // m), -(-video_tokens // n)
    level_map = torch.ones(importance.shape, dtype=torch.int16)
    for h in range(2):
        for i in range(rows):
            row = importance[0, h, i, :blocks].tolist()
            level_map[0, h, i, :blocks] = torch.tensor(oracle.oracle_levels(row, coarse, "topk"))
    assert torch.equal(schedule.to_level_map(), level_map)
    assert {1, n} <= set(level_map.unique().tolist()), "the case must read at several factors"
    gain = oracle.oracle_tilt_gain(q, k, v, n, order=place["order"], video_tokens=video_tokens)
    case = {"level_map": level_map, "block_m": m, "block_n": n, "key_variance": True, **place}
    truth = oracle.oracle_attention(q, k, v, value_tilt=True, tilt_gain=gain, **case)
    assert max_error(out, truth) <= 1e-12 * float(truth.abs().max() + 1), "a few thousand roundings of float64"
