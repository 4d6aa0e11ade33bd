"""Stage 3: mean-pooled copies of keys and values, at every factor that a level map may ask for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.kernels.launch import head_strides, load_rows, on_device, pack_factors, padded, remember
from psa_diffusers.kernels.tuning import tile_warps
from psa_diffusers.layout import Layout
from psa_diffusers.stages.pyramid import Pyramid, pooled_rows

_COVARIANCE_PROGRAMS = 512  # enough to fill any chip; a number of the chip's own would change the order of the sums


def build_pyramid(
    k: Tensor,
    v: Tensor,
    layout: Layout,
    factors: tuple[int, ...],
    *,
    key_variance: bool = False,
    value_tilt: bool = False,
) -> Pyramid:
    """Pool keys and values over the cells of every factor. See `psa_diffusers.stages.pyramid.build_pyramid`.

    K and V are read once, in place, through ``layout.key_rows``; with ``value_tilt`` a second time. Empty cells are 0.

    Args:
        k: Keys ``[B, H, L, D]``, tokens as the model has them; any strides with contiguous channels.
        v: Values ``[B, H, L, D]``.
        layout: Where tokens stand.
        factors: Pooling factors, ascending powers of two from 1 to at most ``layout.block_n``.
        key_variance: Whether to keep the key variance of each cell.
        value_tilt: Whether to keep, for each factor, the covariance of keys and values within cells.
    """
    batch, heads, _, dim = k.shape
    block_n, num_blocks = layout.block_n, layout.num_key_blocks
    bases, num_rows = pooled_rows(num_blocks * block_n, factors)
    keys, values = (torch.empty(batch, heads, num_rows, dim, dtype=x.dtype, device=x.device) for x in (k, v))
    variance = torch.empty(batch, heads, num_rows, dtype=torch.float32, device=k.device) if key_variance else None
    broken = torch.empty(batch, heads, num_blocks, dtype=torch.int8, device=k.device)
    log_counts = remember(layout, ("log_counts", factors), lambda: _log_counts(layout, factors))
    with on_device(k):
        _pyramid_kernel[(num_blocks, batch * heads)](
            k, v, layout.key_rows, keys, values, keys if variance is None else variance, broken,
            head_strides(k), head_strides(v), heads, num_blocks, num_rows,
            FACTORS=sum(factors), LEVELS=factors[-1].bit_length() - 1, HEAD_DIM=dim, D_PAD=padded(dim), BLOCK_N=block_n,
            KEY_VARIANCE=key_variance, num_warps=tile_warps(block_n * padded(dim)), enable_fp_fusion=True,
        )  # fmt: skip
    return Pyramid(
        factors=tuple(factors),
        bases=bases,
        keys=keys,
        values=values,
        log_counts=log_counts,
        variance=variance,
        covariance=_covariance(k, v, layout, keys, values, log_counts, factors) if value_tilt else None,
        finite=~broken.any(-1),
    )


def _log_counts(layout: Layout, factors: tuple[int, ...]) -> Tensor:
    counts = [layout.cell_counts(factor) for factor in factors if factor > 1]
    return torch.cat(counts).float().log() if counts else torch.zeros(0, device=layout.key_rows.device)


def _covariance(
    k: Tensor, v: Tensor, layout: Layout, keys: Tensor, values: Tensor, log_counts: Tensor, factors: tuple[int, ...]
) -> Tensor:
    """Within-cell covariance of keys and values at every factor: ``[B, H, F, D, D]`` float32.

    By the law of total covariance, what a factor adds to the factor before it is the covariance of that one's cells
    within its own cells: tokens are read for the first pooled factor only, then cells. Each program sums over its part
    of the cells, and the parts are added in a fixed order.
    """
    batch, heads, tokens, dim = k.shape
    covariance = torch.zeros(batch, heads, len(factors), dim, dim, dtype=torch.float32, device=k.device)
    if len(factors) == 1:
        return covariance
    num_lanes = layout.key_rows.shape[0]
    columns = min(padded(dim), 128)
    tile = 64 if padded(dim) < 128 else 32  # cells an iteration: more do not fit the registers
    panels = padded(dim) // columns
    tiles = triton.cdiv(num_lanes, tile)
    splits = max(1, min(triton.cdiv(tiles, 16), _COVARIANCE_PROGRAMS // (batch * heads * panels)))
    parts = torch.empty(splits, batch, heads, len(factors) - 1, dim, dim, dtype=torch.float32, device=k.device)

    def launch(first: int, number: int, from_tokens: bool) -> None:
        _covariance_kernel[(splits * panels, number, batch * heads)](
            k, v, layout.key_rows, keys, values, log_counts, parts,
            head_strides(k), head_strides(v), heads, num_lanes, keys.shape[2],
            len(factors), pack_factors(factors), first, splits,
            HEAD_DIM=dim, D_PAD=padded(dim), TILE=tile, COLUMNS=columns, FROM_TOKENS=from_tokens,
            num_warps=8 if padded(dim) >= 128 else 4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip

    with on_device(k):
        launch(1, 1, True)
        if len(factors) > 2:
            launch(2, len(factors) - 2, False)
    covariance[:, :, 1:] = parts.sum(0).cumsum(2).div_(tokens)
    return covariance


@triton.jit(do_not_specialize=["num_blocks", "num_rows"])
def _pyramid_kernel(
    k_ptr, v_ptr, rows_ptr,                # [B, H, L, D] [B, H, L, D] [N * BLOCK_N]
    keys_ptr, values_ptr, variance_ptr,    # [B, H, P, D] [B, H, P, D] [B, H, P]
    broken_ptr,                            # [B, H, N] int8, 1 = a number of the block is not finite
    K_STRIDES, V_STRIDES, H, num_blocks, num_rows,
    FACTORS: tl.constexpr, LEVELS: tl.constexpr,  # the factors, one bit each; log2 of the largest
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, KEY_VARIANCE: tl.constexpr,
):  # fmt: skip
    """One key block, all factors. Grid: (N, B * H)."""
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    k_ptr += i_b * K_STRIDES[0] + i_h * K_STRIDES[1]
    v_ptr += i_b * V_STRIDES[0] + i_h * V_STRIDES[1]
    o_d = tl.arange(0, D_PAD)
    rows = tl.load(rows_ptr + i_n * BLOCK_N + tl.arange(0, BLOCK_N))
    real = (rows >= 0).to(tl.float32)
    b_k = load_rows(k_ptr, rows, rows >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
    broken = _any_broken(b_k)
    _pool(
        b_k, real, keys_ptr + i_bh * num_rows * HEAD_DIM, variance_ptr + i_bh * num_rows, i_n, num_blocks,
        FACTORS, LEVELS, HEAD_DIM, D_PAD, BLOCK_N, KEY_VARIANCE,
    )  # fmt: skip
    tl.debug_barrier()  # else the values are loaded early, and no registers are left for the keys
    b_v = load_rows(v_ptr, rows, rows >= 0, V_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
    broken = tl.maximum(broken, _any_broken(b_v))
    _pool(
        b_v, real, values_ptr + i_bh * num_rows * HEAD_DIM, variance_ptr, i_n, num_blocks,
        FACTORS, LEVELS, HEAD_DIM, D_PAD, BLOCK_N, False,
    )  # fmt: skip
    tl.store(broken_ptr + i_bh * num_blocks + i_n, broken.to(tl.int8))


@triton.jit
def _any_broken(x):
    # the comparison is false for NaN too
    return 1 - tl.min(tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1), 0)


@triton.jit
def _pool(
    mean, count, out_ptr, variance_ptr, i_n, num_blocks,
    FACTORS: tl.constexpr, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    VARIANCE: tl.constexpr,
):  # fmt: skip
    """Halve the block level by level, and store the levels that are factors of the preset."""
    o_d = tl.arange(0, D_PAD)
    scatter = tl.zeros([BLOCK_N], tl.float32)
    base = 0
    for level in tl.static_range(1, LEVELS + 1):
        mean, count, scatter = _merge_pairs(mean, count, scatter, BLOCK_N >> level, D_PAD, VARIANCE)
        if (FACTORS >> level) & 1:
            row = base + i_n * (BLOCK_N >> level) + tl.arange(0, BLOCK_N >> level)
            tl.store(
                out_ptr + row[:, None] * HEAD_DIM + o_d[None, :],
                mean.to(out_ptr.dtype.element_ty),
                mask=(o_d < HEAD_DIM)[None, :],
            )
            if VARIANCE:
                tl.store(variance_ptr + row, scatter / (tl.maximum(count, 1.0) * HEAD_DIM))
            base += num_blocks * (BLOCK_N >> level)


@triton.jit
def _merge_pairs(mean, count, scatter, CELLS: tl.constexpr, D_PAD: tl.constexpr, VARIANCE: tl.constexpr):
    """Mean ``[CELLS, D]``, number of tokens and sum of squared deviations ``[CELLS]`` of the union of neighbours."""
    pair = tl.reshape(mean, (CELLS, 2, D_PAD))
    number = tl.reshape(count, (CELLS, 2))
    total = tl.sum(number, 1)
    merged = tl.sum(pair * number[:, :, None], 1) / tl.maximum(total, 1.0)[:, None]
    between = tl.sum(tl.reshape(scatter, (CELLS, 2)), 1)
    if VARIANCE:
        # parallel-axis formula: differences of means, never of squares, so nothing cancels
        away = pair - merged[:, None, :]
        between += tl.sum(tl.sum(away * away, 2) * number, 1)
    return merged, total, between


@triton.jit(do_not_specialize=["num_lanes", "num_rows", "num_factors", "packed_factors", "first", "splits"])
def _covariance_kernel(
    k_ptr, v_ptr, rows_ptr,                # [B, H, L, D] [B, H, L, D] [N * block_n]
    keys_ptr, values_ptr, log_counts_ptr,  # [B, H, P, D] [B, H, P, D] [P]
    parts_ptr,                             # [splits, B, H, F - 1, D, D]
    K_STRIDES, V_STRIDES, H, num_lanes, num_rows, num_factors, packed_factors, first, splits,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, FROM_TOKENS: tl.constexpr,
):  # fmt: skip
    """Covariance of the cells of one factor (the fine ones) within the cells of the next (the coarse ones).

    Grid: (splits * panels of COLUMNS value channels, factors, B * H). Factor `first + program_id(1)` is the coarse one.
    """
    split = tl.program_id(0) % splits
    panel = tl.program_id(0) // splits
    f = first + tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    k_ptr += i_b * K_STRIDES[0] + i_h * K_STRIDES[1]
    v_ptr += i_b * V_STRIDES[0] + i_h * V_STRIDES[1]
    log2_coarse = (packed_factors >> (4 * f)) & 15
    log2_fine = (packed_factors >> (4 * (f - 1))) & 15
    base_fine = 0
    base_coarse = 0
    for g in range(1, f):
        base_fine = base_coarse
        base_coarse += num_lanes >> ((packed_factors >> (4 * g)) & 15)

    keys_ptr += i_bh * num_rows * HEAD_DIM
    values_ptr += i_bh * num_rows * HEAD_DIM
    num_cells = num_lanes >> log2_fine
    share = tl.cdiv(tl.cdiv(num_cells, TILE), splits) * TILE
    stop = tl.minimum((split + 1) * share, num_cells)
    o_t = tl.arange(0, TILE)
    o_d = tl.arange(0, D_PAD)
    o_c = panel * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([D_PAD, COLUMNS], tl.float32)
    for t in range(split * share, stop, TILE):
        cell = t + o_t
        real = cell < stop
        coarse = base_coarse + (cell >> (log2_coarse - log2_fine))
        if FROM_TOKENS:
            fine = tl.load(rows_ptr + cell, mask=real, other=-1)
            weight = (fine >= 0).to(tl.float32)
            b_k = load_rows(k_ptr, fine, fine >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD)
            b_v = load_rows(v_ptr, fine, fine >= 0, V_STRIDES[2], o_c, HEAD_DIM, COLUMNS)
        else:
            fine = base_fine + cell
            # 1 for a full cell: a count would take float16 further from its reach
            weight = tl.exp(tl.load(log_counts_ptr + fine, mask=real, other=float("-inf"))) / (1 << log2_fine)
            b_k = load_rows(keys_ptr, fine, real, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
            b_v = load_rows(values_ptr, fine, real, HEAD_DIM, o_c, HEAD_DIM, COLUMNS)
        mean_k = load_rows(keys_ptr, coarse, real, HEAD_DIM, o_d, HEAD_DIM, D_PAD).to(tl.float32)
        mean_v = load_rows(values_ptr, coarse, real, HEAD_DIM, o_c, HEAD_DIM, COLUMNS).to(tl.float32)
        away_k = (b_k.to(tl.float32) - mean_k) * weight[:, None]
        away_v = tl.where(weight[:, None] > 0, b_v.to(tl.float32) - mean_v, 0.0)
        total = tl.dot(tl.trans(away_k.to(b_k.dtype)), away_v.to(b_k.dtype), total, input_precision="ieee")
    total *= (1 << log2_fine).to(tl.float32)

    i_part = (split * tl.num_programs(2) + i_bh) * (num_factors - 1) + f - 1
    tl.store(
        parts_ptr + i_part * HEAD_DIM * HEAD_DIM + o_d[:, None] * HEAD_DIM + o_c[None, :],
        total,
        mask=(o_d < HEAD_DIM)[:, None] & (o_c < HEAD_DIM)[None, :],
    )
