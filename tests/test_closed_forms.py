"""What must hold whatever the data: the consequences of the definition, as properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers import PSAPreset, psa_attention, pyramid_attention

BLOCKS = st.sampled_from([16, 32, 64, 128])
DIMS = st.sampled_from([16, 24, 64, 96])
TERMS = st.booleans()
few = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def problems(draw, *, with_skips):
    """q, k, v in float64 (so that equalities of real numbers hold to 1e-12), a level map and the block sizes."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    L, D, m, n = draw(st.integers(1, 400)), draw(DIMS), draw(BLOCKS), draw(BLOCKS)
    q, k, v = (torch.randn(1, 2, L, D, generator=rng, dtype=torch.double) for _ in range(3))
    factors = [f for f in (0, 1, 2, 4, 8, 16, 32, 64, 128) if f <= n and (f or with_skips)]
    used = draw(st.lists(st.sampled_from(factors), min_size=1, unique=True))
    shape = (1, 2, -(-L // m), -(-L // n))
    level_map = torch.tensor(used)[torch.randint(0, len(used), shape, generator=rng)]
    return q, k, v, level_map, {"block_m": m, "block_n": n, "backend": "torch"}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@few
@given(problems(with_skips=False), TERMS, TERMS)
def test_all_factors_one_is_dense_attention(problem, key_variance, value_tilt):
    q, k, v, level_map, kwargs = problem
    out = pyramid_attention(
        q, k, v, torch.ones_like(level_map), key_variance=key_variance, value_tilt=value_tilt, **kwargs
    )
    close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@few
@given(problems(with_skips=False), TERMS, TERMS)
def test_zero_query_gives_the_plain_mean_of_v(problem, key_variance, value_tilt):
    q, k, v, level_map, kwargs = problem
    out = pyramid_attention(
        torch.zeros_like(q), k, v, level_map, key_variance=key_variance, value_tilt=value_tilt, **kwargs
    )
    close(out, v.mean(2, keepdim=True).expand_as(v))


@few
@given(problems(with_skips=True), TERMS)
def test_a_skipped_block_changes_no_bit(problem, key_variance):
    q, k, v, level_map, kwargs = problem
    n = kwargs["block_n"]
    level_map = level_map.clone()
    level_map[..., -1] = 0
    start = (level_map.shape[-1] - 1) * n
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, start:] = torch.nan
    other_v[:, :, start:] = torch.inf
    first, second = (
        pyramid_attention(q, *kv, level_map, key_variance=key_variance, **kwargs) for kv in ((k, v), (other_k, other_v))
    )
    assert torch.equal(first, second)


@few
@given(problems(with_skips=False), TERMS, TERMS)
def test_tokens_of_a_pooled_cell_may_change_places(problem, key_variance, value_tilt):
    q, k, v, _, kwargs = problem
    n, tokens = kwargs["block_n"], q.shape[2]
    level_map = torch.full((1, 2, -(-tokens // kwargs["block_m"]), -(-tokens // n)), min(8, n))
    order = torch.arange(tokens).split(min(8, n))
    order = torch.cat([cell.flip(0) for cell in order])
    first, second = (
        pyramid_attention(q, *kv, level_map, key_variance=key_variance, value_tilt=value_tilt, **kwargs)
        for kv in ((k, v), (k[:, :, order], v[:, :, order]))
    )
    close(first, second)


@few
@given(problems(with_skips=True))
def test_a_row_that_keeps_nothing_is_zero(problem):
    q, k, v, level_map, kwargs = problem
    level_map = level_map.clone()
    level_map[:, :, 0] = 0
    out = pyramid_attention(q, k, v, level_map, **kwargs)
    assert (out[:, :, : kwargs["block_m"]] == 0).all()


@few
@given(problems(with_skips=False), st.sampled_from([1, 2, 4, 8, 16]))
def test_equal_keys_within_cells_make_pooling_exact(problem, factor):
    q, k, v, _, kwargs = problem
    tokens = q.shape[2]
    k = k[:, :, ::factor].repeat_interleave(factor, 2)[:, :, :tokens]
    level_map = torch.full((1, 2, -(-tokens // kwargs["block_m"]), -(-tokens // kwargs["block_n"])), factor)
    for terms in ({}, {"key_variance": True, "value_tilt": True}):
        out = pyramid_attention(q, k, v, level_map, **terms, **kwargs)
        close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@few
@given(st.tuples(*[st.integers(1, 7)] * 3), st.sampled_from([0, 5, 40]), st.booleans(), st.booleans(), TERMS)
def test_reading_everything_is_dense_on_any_grid(grid, text, text_first, rearrange, terms):
    rng = torch.Generator().manual_seed(grid[0] * 49 + grid[1] * 7 + grid[2])
    tokens = grid[0] * grid[1] * grid[2] + text
    q, k, v = (torch.randn(1, 1, tokens, 16, generator=rng, dtype=torch.double) for _ in range(3))
    preset = PSAPreset(
        mask_ratios={1: [0, 1]},
        block_size={"m": 16, "n": 16},
        use_rearrange=rearrange,
        key_variance=terms,
        value_tilt=terms,
    )
    out = psa_attention(q, k, v, preset, grid=grid, text_tokens=text, text_first=text_first, backend="torch")
    close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("slot", [0, 1])
def test_the_place_in_the_batch_does_not_matter(slot, rng):
    q, k, v = (torch.randn(2, 2, 130, 16, generator=rng) for _ in range(3))
    preset = PSAPreset(block_size={"m": 32, "n": 32}, value_tilt=True, key_variance=True)
    both = psa_attention(q, k, v, preset, grid=(2, 5, 13), backend="torch")
    one = psa_attention(*(x[slot : slot + 1] for x in (q, k, v)), preset, grid=(2, 5, 13), backend="torch")
    assert torch.equal(both[slot : slot + 1], one)
