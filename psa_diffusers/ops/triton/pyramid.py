"""Stage 3: mean-pooled copies of keys and values, at every factor that a level map may ask for."""

from dataclasses import replace
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.triton.launch import (
    aside,
    cdiv,
    head_strides,
    load_rows,
    on_device,
    pack_factors,
    padded,
    remember,
)
from psa_diffusers.ops.triton.tuning import COVARIANCE, PYRAMID, launch_of
from psa_diffusers.ops.types import POOLED_CELL, Factors, Pyramid, pooled_rows

_COVARIANCE_ROWS = 4096  # tokens a program sums over; a number of the chip's own would change the order of the sums


def build_pyramid(
    k: Tensor, v: Tensor, layout: Layout, factors: Factors, *, key_variance: bool = False, value_tilt: bool = False
) -> Pyramid:
    """Pool keys and values over the cells of every factor. As in `ops.reference`; empty cells are 0.

    K and V are read once, in place, through ``layout.key_rows``; with ``value_tilt`` a second time. Where no factor is
    as wide as a cell of the estimate of importance, those cells are kept as well.
    """
    batch, heads, _, dim = k.shape
    block_n, num_blocks = layout.block_n, layout.num_key_blocks
    bases, num_rows = pooled_rows(num_blocks * block_n, factors)
    keys, values = (torch.empty(batch, heads, num_rows, dim, dtype=x.dtype, device=x.device) for x in (k, v))
    variance = torch.empty(batch, heads, num_rows, dtype=torch.float32, device=k.device) if key_variance else None
    finite = torch.ones(batch, heads, dtype=torch.bool, device=k.device)
    cells = None
    if len(factors) > 1 and POOLED_CELL not in factors and POOLED_CELL <= block_n:
        room = (batch, heads, num_blocks * block_n // POOLED_CELL)
        variances = torch.empty(room, dtype=torch.float32, device=k.device) if key_variance else None
        cells = torch.empty(*room, dim, dtype=k.dtype, device=k.device), variances
    outputs = [keys, values, variance, *(cells or (None, None))]
    log_counts = remember(layout, ("log_counts", factors), lambda: _log_counts(layout, factors))
    launch = launch_of(PYRAMID, dim, k.element_size(), k.device)
    span = min(launch.span, block_n)
    # a tile of spans, so that a thread merges whole spans in its registers
    blocks = max(1, 1024 * span // (block_n * padded(dim)))
    spans = blocks * (block_n // span)
    # smaller blocks have wider tiles of neighbours, for which so few do not suffice
    cap = {"maxnreg": launch.registers} if launch.registers and block_n >= 128 else {}
    with on_device(k):
        _pyramid_kernel[(cdiv(num_blocks, blocks), batch * heads)](
            k, v, layout.key_rows, tuple(keys if x is None else x for x in outputs), finite,
            head_strides(k), head_strides(v), heads, num_blocks, num_rows,
            FACTORS=sum(factors), CELL=POOLED_CELL if cells else 0, HEAD_DIM=dim, D_PAD=padded(dim), BLOCK_N=block_n,
            BLOCKS=blocks, SPAN=span, KEY_VARIANCE=key_variance,
            num_warps=max(1, min(8, spans * padded(dim) // (32 * launch.channels))), enable_fp_fusion=True, **cap,
        )  # fmt: skip
    pyramid = Pyramid(
        factors=tuple(factors),
        bases=bases,
        keys=keys,
        values=values,
        log_counts=log_counts,
        variance=variance,
        covariance=None,
        finite=finite,
        cells=cells,
    )
    if not value_tilt:
        return pyramid
    # importance and levels do not need it: they are estimated meanwhile
    with aside(k) as done:
        covariance = _covariance(k, v, layout, keys, values, log_counts, factors)
    return replace(pyramid, covariance=covariance, ready=done[0] if done else None)


def _log_counts(layout: Layout, factors: Factors) -> Tensor:
    counts = [layout.cell_counts(factor) for factor in factors if factor > 1]
    return torch.cat(counts).float().log() if counts else torch.zeros(0, device=layout.key_rows.device)


def _covariance(
    k: Tensor, v: Tensor, layout: Layout, keys: Tensor, values: Tensor, log_counts: Tensor, factors: Factors
) -> Tensor:
    """Within-cell covariance of keys and values at every factor: ``[B, H, F, D, D]`` float32.

    By the law of total covariance, what a factor adds to the factor before it is the covariance of that one's cells
    within its own cells: tokens are read for the first pooled factor only, then cells. Each program sums over its part
    of the cells, and the parts are added in a fixed order.
    """
    batch, heads, tokens, dim = k.shape
    covariance = torch.empty(batch, heads, len(factors), dim, dim, dtype=torch.float32, device=k.device)
    if len(factors) == 1:
        return covariance.zero_()
    num_lanes = layout.key_rows.shape[0]
    steps = [coarse // fine for fine, coarse in pairwise(factors)]  # fine cells in a coarse one
    # there are fewer cells than tokens: shorter parts keep the chip busy
    cells = [_COVARIANCE_ROWS, *(_COVARIANCE_ROWS // (2 if step == 2 else 4) for step in steps[1:])]
    splits = [cdiv(num_lanes // fine, part) for fine, part in zip(factors[:-1], cells, strict=True)]
    ends = remember(layout, ("splits", factors), lambda: torch.tensor(splits).cumsum(0).int().to(k.device))
    tuned = launch_of(COVARIANCE, dim, k.element_size(), k.device)
    columns = min(padded(dim), tuned.columns)
    panels = cdiv(dim, columns)
    parts = torch.empty(sum(splits), batch * heads, dim, dim, dtype=torch.float32, device=k.device)

    def launch(first: int, last: int) -> None:
        step = steps[first - 1]
        tile = tuned.pairs if step == 2 else tuned.cells
        _covariance_kernel[(splits[first - 1] * panels, last - first + 1, batch * heads)](
            k, v, layout.key_rows, keys, values, log_counts, parts, ends,
            head_strides(k), head_strides(v), heads, num_lanes, keys.shape[2], pack_factors(factors), first,
            HEAD_DIM=dim, D_PAD=padded(dim), TILE=tile, COLUMNS=columns, PANELS=panels,
            CELLS=cells[first - 1], FROM_TOKENS=first == 1, PAIRS=step == 2, ONE_MEAN=step >= tile,
            num_warps=tuned.num_warps, num_stages=tuned.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    with on_device(k):
        launch(1, 1)
        # runs of factors that one kernel does for, in one launch each
        kinds = [(step == 2, step >= tuned.cells) for step in steps]
        first = 2
        while first < len(factors):
            last = first
            while last + 1 < len(factors) and kinds[last] == kinds[first - 1]:
                last += 1
            launch(first, last)
            first = last + 1
        _add_parts_kernel[(cdiv(dim * dim, 512), batch * heads)](
            parts, ends, covariance, dim * dim, 1 / tokens, F=len(factors), SIZE=512, num_warps=4, enable_fp_fusion=True
        )
    return covariance


@triton.jit(do_not_specialize=["num_blocks", "num_rows"])
def _pyramid_kernel(
    k_ptr, v_ptr, rows_ptr,                # [B, H, L, D] [B, H, L, D] [N * BLOCK_N]
    out,                                   # [B, H, P, D] [B, H, P, D] [B, H, P]; [B, H, cells, D] [B, H, cells]
    finite_ptr,                            # [B, H] bool, true before
    K_STRIDES, V_STRIDES, H, num_blocks, num_rows,
    FACTORS: tl.constexpr, CELL: tl.constexpr,  # the factors, one bit each; a width more that keys are kept of, or 0
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
    KEY_VARIANCE: tl.constexpr,
):  # fmt: skip
    """BLOCKS key blocks, all factors, every token read once. Grid: (cdiv(N, BLOCKS), B * H).

    A block is cut into spans of SPAN tokens. Token i of all spans is one tile ``[SPANS, D]``; tiles are merged two by
    two as a binary counter counts, so the first levels need no exchange between threads.
    """
    SPANS: tl.constexpr = BLOCKS * BLOCK_N // SPAN
    i_bh = tl.program_id(1).to(tl.int64)
    k_ptr += (i_bh // H) * K_STRIDES[0] + (i_bh % H) * K_STRIDES[1]
    v_ptr += (i_bh // H) * V_STRIDES[0] + (i_bh % H) * V_STRIDES[1]
    first = tl.program_id(0) * (BLOCKS * BLOCK_N)
    num_lanes = num_blocks * BLOCK_N
    before = i_bh * num_rows  # cells of other heads
    out = (out[0] + before * HEAD_DIM, out[1] + before * HEAD_DIM, out[2] + before, out[3], out[4])
    if CELL:
        before = i_bh * (num_lanes // CELL)
        out = (out[0], out[1], out[2], out[3] + before * HEAD_DIM, out[4] + before)
    o_d = tl.arange(0, D_PAD)
    lane = first + tl.arange(0, SPANS) * SPAN
    lanes = (lane, lane < num_lanes, num_lanes)
    for i in tl.static_range(SPAN):
        rows = tl.load(rows_ptr + lane + i, mask=lanes[1], other=-1)
        k = load_rows(k_ptr, rows, rows >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
        v = load_rows(v_ptr, rows, rows >= 0, V_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
        # sums of squares by eight channels: a thread has them
        cells = (k, v, (rows >= 0).to(tl.float32), tl.zeros([SPANS, D_PAD // 8], tl.float32))
        if SPAN >= 2:
            if i % 2 == 0:
                cells1 = cells
            else:
                cells = _merge(cells1, cells, KEY_VARIANCE)
                _keep(cells, out, lanes, i, 1, FACTORS, CELL, HEAD_DIM, D_PAD, KEY_VARIANCE)
                if SPAN >= 4:
                    if i % 4 == 1:
                        cells2 = cells
                    else:
                        cells = _merge(cells2, cells, KEY_VARIANCE)
                        _keep(cells, out, lanes, i, 2, FACTORS, CELL, HEAD_DIM, D_PAD, KEY_VARIANCE)
                        if SPAN >= 8:
                            if i % 8 == 3:
                                cells3 = cells
                            else:
                                cells = _merge(cells3, cells, KEY_VARIANCE)
                                _keep(cells, out, lanes, i, 3, FACTORS, CELL, HEAD_DIM, D_PAD, KEY_VARIANCE)
                                if SPAN >= 16:
                                    if i % 16 == 7:
                                        cells4 = cells
                                    else:
                                        cells = _merge(cells4, cells, KEY_VARIANCE)
                                        _keep(cells, out, lanes, i, 4, FACTORS, CELL, HEAD_DIM, D_PAD, KEY_VARIANCE)

    # what is not finite stays so in the mean; the comparison is false for NaN too
    sound = (tl.abs(cells[0]) < float("inf")) & (tl.abs(cells[1]) < float("inf"))
    all_sound = tl.min(tl.min(sound.to(tl.int32), 1), 0)
    tl.store(finite_ptr + i_bh, all_sound > 0, mask=all_sound == 0)  # whoever stores, stores the same

    # what is wider than a span: neighbours in the tile
    for level in tl.static_range(1, 16):
        if (1 << level) > SPAN and ((FACTORS | CELL) >> level):
            cells = _merge_neighbours(cells, BLOCKS * BLOCK_N >> level, D_PAD, KEY_VARIANCE)
            start = first + (tl.arange(0, BLOCKS * BLOCK_N >> level) << level)
            starts = (start, start < num_lanes, num_lanes)
            _keep(cells, out, starts, 0, level, FACTORS, CELL, HEAD_DIM, D_PAD, KEY_VARIANCE)


@triton.jit
def _merge(one, other, VARIANCE: tl.constexpr):
    """Two sets of cells taken together: means ``[R, D]``, numbers of tokens ``[R]``, sums of squares ``[R, D / 8]``."""
    ka, va, na, sa = one
    kb, vb, nb, sb = other
    n = na + nb
    share = nb / tl.maximum(n, 1.0)
    away = kb - ka
    s = sa + sb
    if VARIANCE:
        # parallel-axis formula: differences of means, never of squares, so nothing cancels
        s += tl.sum(tl.reshape(away * away, (s.shape[0], s.shape[1], 8)), 2) * (na * share)[:, None]
    return ka + away * share[:, None], va + (vb - va) * share[:, None], n, s


@triton.jit
def _keep(
    cells, out, lanes, i,
    LEVEL: tl.constexpr, FACTORS: tl.constexpr, CELL: tl.constexpr,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    """Store the cells in which the lanes, i further on, stand, if they are as wide as a factor, or CELL wide."""
    IS_FACTOR: tl.constexpr = (FACTORS >> LEVEL) & 1
    if IS_FACTOR or CELL == 1 << LEVEL:
        lane, inside, num_lanes = lanes
        row = (lane + i) >> LEVEL
        if IS_FACTOR:
            for finer in tl.static_range(1, LEVEL):
                if (FACTORS >> finer) & 1:
                    row += num_lanes >> finer
        keys_ptr = out[0] if IS_FACTOR else out[3]
        variance_ptr = out[2] if IS_FACTOR else out[4]
        o_d = tl.arange(0, D_PAD)
        number = row[:, None] * HEAD_DIM + o_d[None, :]
        mask = inside[:, None] & (o_d < HEAD_DIM)[None, :]
        tl.store(keys_ptr + number, cells[0].to(keys_ptr.dtype.element_ty), mask=mask)
        if IS_FACTOR:
            tl.store(out[1] + number, cells[1].to(out[1].dtype.element_ty), mask=mask)
        if VARIANCE:
            tl.store(variance_ptr + row, tl.sum(cells[3], 1) / (tl.maximum(cells[2], 1.0) * HEAD_DIM), mask=inside)


@triton.jit
def _merge_neighbours(cells, CELLS: tl.constexpr, D_PAD: tl.constexpr, VARIANCE: tl.constexpr):
    """As `_merge`, of cells that stand next to each other in one tile: ``[2 * CELLS, D]`` to ``[CELLS, D]``."""
    k, v, n, s = cells
    pair_n = tl.reshape(n, (CELLS, 2))
    total = tl.sum(pair_n, 1)
    share = tl.reshape(pair_n / tl.maximum(total, 1.0)[:, None], (CELLS, 2, 1))
    pair_k = tl.reshape(k, (CELLS, 2, D_PAD))
    mean_k = tl.sum(pair_k * share, 1)
    mean_v = tl.sum(tl.reshape(v, (CELLS, 2, D_PAD)) * share, 1)
    s = tl.sum(tl.reshape(s, (CELLS, 2, D_PAD // 8)), 1)
    if VARIANCE:
        away = pair_k - mean_k[:, None, :]
        s += tl.sum(tl.sum(tl.reshape(away * away, (CELLS, 2, D_PAD // 8, 8)), 3) * pair_n[:, :, None], 1)
    return mean_k, mean_v, total, s


@triton.jit(do_not_specialize=["num_lanes", "num_rows", "packed_factors", "first"])
def _covariance_kernel(
    k_ptr, v_ptr, rows_ptr,                # [B, H, L, D] [B, H, L, D] [N * block_n]
    keys_ptr, values_ptr, log_counts_ptr,  # [B, H, P, D] [B, H, P, D] [P]
    parts_ptr, ends_ptr,                   # [parts, B * H, D, D] [F - 1]: where the parts of each factor end
    K_STRIDES, V_STRIDES, H, num_lanes, num_rows, packed_factors, first,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, PANELS: tl.constexpr,
    CELLS: tl.constexpr, FROM_TOKENS: tl.constexpr, PAIRS: tl.constexpr, ONE_MEAN: tl.constexpr,
):  # fmt: skip
    """Covariance of CELLS cells of one factor (the fine ones) within the cells of the next (the coarse ones).

    With PAIRS a coarse cell is two fine ones, with ONE_MEAN a whole number of tiles. Factor `first + program_id(1)` is
    the coarse one. Grid: (splits * PANELS of COLUMNS value channels, factors, B * H).
    """
    split = tl.program_id(0) // PANELS
    panel = tl.program_id(0) % PANELS
    f = first + tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    log2_coarse = (packed_factors >> (4 * f)) & 15
    log2_fine = (packed_factors >> (4 * (f - 1))) & 15
    num_cells = num_lanes >> log2_fine
    if split * CELLS < num_cells:
        base_fine = 0
        base_coarse = 0
        for g in range(1, f):
            base_fine = base_coarse
            base_coarse += num_lanes >> ((packed_factors >> (4 * g)) & 15)
        k_ptr += (i_bh // H) * K_STRIDES[0] + (i_bh % H) * K_STRIDES[1]
        v_ptr += (i_bh // H) * V_STRIDES[0] + (i_bh % H) * V_STRIDES[1]
        keys_ptr += i_bh * num_rows * HEAD_DIM
        values_ptr += i_bh * num_rows * HEAD_DIM
        stop = tl.minimum((split + 1) * CELLS, num_cells)
        o_t = tl.arange(0, TILE)
        o_d = tl.arange(0, D_PAD)
        o_c = panel * COLUMNS + tl.arange(0, COLUMNS)
        source = (
            k_ptr, v_ptr, rows_ptr, keys_ptr, values_ptr, log_counts_ptr,
            K_STRIDES[2], V_STRIDES[2], base_fine, log2_fine,
        )  # fmt: skip
        total = tl.zeros([D_PAD, COLUMNS], tl.float32)
        for t in range(split * CELLS, stop, 2 * TILE if PAIRS else TILE):
            if PAIRS:
                # of two cells, n1 n2 / (n1 + n2) (k1 - k2)^T (v1 - v2) is all there is
                cell = t + 2 * o_t
                k1, v1, n1 = _cells(cell, stop, source, o_d, o_c, HEAD_DIM, D_PAD, COLUMNS, FROM_TOKENS)
                k2, v2, n2 = _cells(cell + 1, stop, source, o_d, o_c, HEAD_DIM, D_PAD, COLUMNS, FROM_TOKENS)
                weight = n1 * n2 / tl.maximum(n1 + n2, 1e-6)
                away_k = k1.to(tl.float32) - k2.to(tl.float32)
                away_v = v1.to(tl.float32) - v2.to(tl.float32)
            else:
                k1, v1, weight = _cells(t + o_t, stop, source, o_d, o_c, HEAD_DIM, D_PAD, COLUMNS, FROM_TOKENS)
                cell = t + (tl.arange(0, 1) if ONE_MEAN else o_t)
                coarse = base_coarse + (cell >> (log2_coarse - log2_fine))
                mean_k = load_rows(keys_ptr, coarse, cell < stop, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
                mean_v = load_rows(values_ptr, coarse, cell < stop, HEAD_DIM, o_c, HEAD_DIM, COLUMNS)
                away_k = k1.to(tl.float32) - mean_k.to(tl.float32)
                away_v = v1.to(tl.float32) - mean_v.to(tl.float32)
            # the weight goes to the values: what is transposed is cheaper to make where it is loaded
            away_v = tl.where(weight[:, None] > 0, away_v * weight[:, None], 0.0).to(k1.dtype)
            total = tl.dot(tl.trans(away_k.to(k1.dtype)), away_v, total, input_precision="ieee")
        total *= (1 << log2_fine).to(tl.float32)

        start = 0
        if f > 1:
            start = tl.load(ends_ptr + f - 2)
        i_part = (start + split) * tl.num_programs(2) + i_bh
        tl.store(
            parts_ptr + i_part * HEAD_DIM * HEAD_DIM + o_d[:, None] * HEAD_DIM + o_c[None, :],
            total,
            mask=(o_d < HEAD_DIM)[:, None] & (o_c < HEAD_DIM)[None, :],
        )


@triton.jit
def _cells(
    cell, stop, source, o_d, o_c, D: tl.constexpr, D_PAD: tl.constexpr, COLUMNS: tl.constexpr, FROM_TOKENS: tl.constexpr
):
    """Keys, some channels of the values, and weights of cells: tokens, or cells of a pooled factor."""
    k_ptr, v_ptr, rows_ptr, keys_ptr, values_ptr, log_counts_ptr, k_stride, v_stride, base, log2_factor = source
    if FROM_TOKENS:
        row = tl.load(rows_ptr + cell, mask=cell < stop, other=-1)
        b_k = load_rows(k_ptr, row, row >= 0, k_stride, o_d, D, D_PAD)
        b_v = load_rows(v_ptr, row, row >= 0, v_stride, o_c, D, COLUMNS)
        return b_k, b_v, (row >= 0).to(tl.float32)
    else:
        row = base + cell
        b_k = load_rows(keys_ptr, row, cell < stop, D, o_d, D, D_PAD)
        b_v = load_rows(values_ptr, row, cell < stop, D, o_c, D, COLUMNS)
        # 1 for a full cell: a count would take float16 further from its reach
        count = tl.exp(tl.load(log_counts_ptr + row, mask=cell < stop, other=float("-inf")))
        return b_k, b_v, count / (1 << log2_factor)


@triton.jit
def _add_parts_kernel(
    parts_ptr, ends_ptr, covariance_ptr,  # [parts, B * H, D * D] [F - 1] [B * H, F, D * D]
    size, one_over_tokens, F: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Add up the parts of each factor and of all before it. Grid: (cdiv(D * D, SIZE), B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    parts_ptr += i_bh * size + place
    covariance_ptr += i_bh * F * size + place
    total = tl.zeros([SIZE], tl.float32)
    tl.store(covariance_ptr, total, mask=place < size)
    f = 1
    end = tl.load(ends_ptr)
    # one loop over all parts: Triton 3.6 starts a loop at 0 whose start an outer loop carries
    for i in range(0, tl.load(ends_ptr + F - 2)):
        total += tl.load(parts_ptr + i * tl.num_programs(1) * size.to(tl.int64), mask=place < size, other=0.0)
        if i + 1 == end:
            tl.store(covariance_ptr + f * size, total * one_over_tokens, mask=place < size)
            f += 1
            end = tl.load(ends_ptr + tl.minimum(f, F - 1) - 1)
