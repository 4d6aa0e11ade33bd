"""A number times zero is not zero: what no query reads must not matter, whatever number it is."""

import oracle
import pytest
import torch
from budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers import pyramid_attention
from psa_diffusers.ops import reference, training
from psa_diffusers.ops.layout import flat_layout, make_layout
from psa_diffusers.ops.reference.levels import assign_ranked_levels
from psa_diffusers.ops.types import LevelRule

VALUES = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e30)
CPU = torch.device("cpu")


@settings(max_examples=25)
@given(data=st.data())
def test_what_no_query_reads_changes_no_bit(data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    tokens, block_n = data.draw(st.integers(2, 45), "tokens"), data.draw(st.sampled_from((4, 8, 16)), "block_n")
    q, k, v = (torch.randn(1, 2, tokens, 16, generator=rng) for _ in "qkv")
    blocks = -(-tokens // block_n)
    factors = torch.tensor([0, 1, 2, 4])
    level_map = factors[torch.randint(0, 4, (1, 2, -(-tokens // 8), blocks), generator=rng)]
    unread = data.draw(st.lists(st.integers(0, blocks - 1), min_size=1, unique=True), "blocks")
    level_map[..., unread] = 0
    case = {"level_map": level_map, "block_m": 8, "block_n": block_n, "key_variance": data.draw(st.booleans())}
    clean = pyramid_attention(q, k, v, backend="torch", **case)
    broken = [x.clone() for x in (k, v)]
    for x in broken:
        for block in unread:
            x[:, :, block * block_n : (block + 1) * block_n] = data.draw(st.sampled_from(VALUES))
    assert torch.equal(pyramid_attention(q, *broken, backend="torch", **case), clean)


@pytest.mark.parametrize("backend", [reference, training], ids=["reference", "training"])
@pytest.mark.parametrize("value", VALUES)
def test_the_token_in_the_place_of_empty_lanes_is_not_pooled(value, backend, rng):
    """Empty lanes look at token 0: the cells of other blocks, whole tails among them, must not see it."""
    k, v = (torch.randn(1, 2, 61, 16, generator=rng) for _ in "kv")
    layout, factors = flat_layout(61, 16, 16, CPU), (1, 2, 16)
    terms = {"key_variance": True, "value_tilt": True}
    clean = backend.build_pyramid(k, v, layout, factors, **terms)
    k[:, :, 0], v[:, :, 0] = value, -value
    broken = backend.build_pyramid(k, v, layout, factors, **terms)
    others = torch.ones(32 + 4, dtype=torch.bool)  # cells at 2, then at 16
    others[[0, 32]] = False
    for name in ("keys", "values", "variance"):
        assert torch.equal(getattr(broken, name)[:, :, others], getattr(clean, name)[:, :, others]), name


@pytest.mark.parametrize("value", [1e18, 3e19, 1e30])
@pytest.mark.parametrize("method", ["pooled_mass", "pooled_moments", "sampled_max"])
def test_huge_queries_reach_no_other_block(value, method, rng):
    q, k = (torch.randn(1, 2, 61, 16, generator=rng) for _ in "qk")
    layout = make_layout((1, 5, 9), 16, True, 16, 16, "raster", (1, 1, 1), CPU)
    clean = reference.block_importance(q, k, layout, method, 0.25)
    q[:, :, 0] = value  # of the text: the last block
    broken = reference.block_importance(q, k, layout, method, 0.25)
    assert torch.equal(broken[:, :, :3], clean[:, :, :3])


@pytest.mark.parametrize("value", [1e18, 1e30, 3e38, 1e-30])
def test_the_size_of_keys_does_not_change_their_cosine(value, rng):
    k = torch.randn(1, 2, 61, 16, generator=rng).repeat_interleave(2, 2)[:, :, :61]
    thresholds = ((2, 0.7), (4, 0.1), (8, 0.0))
    k[:, :, :20] *= value / k.abs().max()
    layout = flat_layout(61, 16, 16, CPU)
    expected = oracle.oracle_cosine_cap(k, 16, thresholds)
    assert torch.equal(reference.key_cosine_cap(k, layout, thresholds).long(), expected)
    k[:, :, 0] = torch.nan
    broken = reference.key_cosine_cap(k, layout, thresholds).long()
    assert torch.equal(broken[..., 1:], expected[..., 1:])


@pytest.mark.parametrize("value", VALUES)
def test_a_query_that_is_not_there_reads_nothing(value, rng):
    """The last query block has one row: its empty lanes look at row 0, whose numbers must stay there."""
    q, k, v = (torch.randn(1, 1, 33, 16, generator=rng) for _ in "qkv")
    level_map = torch.tensor([1, 4, 1, 0, 2, 4, 4, 4, 1]).view(1, 1, 3, 3)
    case = {"level_map": level_map, "block_m": 16, "block_n": 16, "key_variance": True, "value_tilt": True}
    q[:, :, 0] = value
    out = pyramid_attention(q, k, v, backend="torch", **case)[:, :, 16:]
    truth = oracle.oracle_attention(q, k, v, **case, only=range(16, 33))[:, :, 16:]
    q[:, :, 0] = 0
    rest = oracle.oracle_attention(q, k, v, **case, dtype=torch.float32, only=range(16, 33))[:, :, 16:]
    assert_within_budget(out, truth, rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_importance_stay_in_range(dtype, rng):
    largest = torch.finfo(dtype).max
    importance = (torch.rand(1, 2, 3, 300, generator=rng, dtype=torch.float64) * largest).to(dtype)
    rule = LevelRule(((1, 0.25), (4, 0.5), (0, 1.0)), "thresholdbound", 0.0)
    got = assign_ranked_levels(importance, rule)
    wide = assign_ranked_levels(importance.double() / largest, rule)
    assert (got != wide).float().mean() < 0.01, "a block at a bound may be rounded to its other side"
