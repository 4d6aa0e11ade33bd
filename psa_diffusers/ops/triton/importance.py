"""Stage 4: an estimate of how much attention each block of queries pays to each block of keys."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.triton.launch import cdiv, head_strides, load_rows, on_device, padded, remember
from psa_diffusers.ops.triton.tuning import importance_launch
from psa_diffusers.ops.types import MOMENT_CAP, MOMENT_CELL, POOLED_CELL, SAMPLE_STRIDE, SHAPE_STRIDE, Pyramid

_PROGRAMS = 2  # a multiprocessor
_READ_BACK = 32  # key blocks at a time
_SHAPE_SPLITS = 16  # programs a head; a number of the chip's own would change the order of the sums


def block_importance(
    q: Tensor, k: Tensor, layout: Layout, method: str, scale: float, pyramid: Pyramid | None = None
) -> Tensor:
    """Estimate the importance of every key block for every query block, float32. As in `ops.reference`."""
    mass, moments = method != "sampled_max", method == "pooled_moments"
    # a cell is `step` lanes wide and represented by the mean of its first `lanes` lanes
    cell = MOMENT_CELL if moments else POOLED_CELL
    step = min(cell, layout.block_m, layout.block_n) if mass else SAMPLE_STRIDE
    lanes = step if mass else 1
    cells_q, _ = _represent(q, layout.query_rows, step, lanes)
    cells_k, variances = _key_cells(k, layout, step, lanes, moments, pyramid)
    if scale < 0:  # the kernel takes the largest product for the largest score
        cells_q, scale = -cells_q, -scale
    qk_scale = max(scale * math.log2(math.e), 1e-30)  # biases are divided by it
    weights, bias = remember(layout, ("cells", step, lanes), lambda: _cell_weights(layout, step, lanes))
    spreads = _spreads(q, k, layout, step, scale) if moments else bias

    batch, heads, num_q, dim = cells_q.shape
    num_blocks_q, num_blocks_k = layout.num_query_blocks, layout.num_key_blocks
    per_m, per_n = layout.block_m // step, layout.block_n // step
    launch = importance_launch(dim, q.element_size(), layout.block_n, q.device)
    rows, columns = max(launch.rows, per_m), max(launch.columns, per_n)
    num_k, blocks = cells_k.shape[2], columns // per_n
    tiles = max(1, min(8, _READ_BACK // blocks))
    work = cdiv(num_q, rows) * batch * heads
    importance = torch.empty(batch, heads, num_blocks_q, num_blocks_k, dtype=torch.float32, device=q.device)
    with on_device(q):
        programs = min(work, _programs(q.device))
        room = (programs, cdiv(num_k, columns * tiles) * tiles, rows * (blocks + 1))
        scratch = torch.empty(room, dtype=torch.float32, device=q.device)
        _importance_kernel[(programs,)](
            cells_q, cells_k, weights, bias, spreads, variances if moments else bias, importance, scratch,
            cells_k.stride()[:2], variances.stride()[:2] if moments else (0, 0),
            heads, num_q, num_k, num_blocks_q, num_blocks_k, work, qk_scale,
            MOMENT_CAP * math.log2(math.e),
            HEAD_DIM=dim, D_PAD=padded(dim), ROWS=rows, COLUMNS=columns, PER_M=per_m, PER_N=per_n, TILES=tiles,
            MASS=mass, MOMENTS=moments,
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return importance


@cache
def _programs(device: torch.device) -> int:
    """Programs that share the work: about as many as run at a time, so that their scratch is small."""
    if device.type != "cuda":
        return 1  # the interpreter runs one after the other
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _key_cells(
    k: Tensor, layout: Layout, step: int, lanes: int, moments: bool, pyramid: Pyramid | None
) -> tuple[Tensor, Tensor | None]:
    """Representatives of the key cells ``[B, H, cells, D]``; for the moments their variances ``[B, H, cells]`` too."""
    known = None
    if pyramid is not None and lanes > 1 and step in pyramid.factors[1:]:
        base = pyramid.bases[pyramid.factors.index(step)]
        cells = slice(base, base + layout.key_rows.shape[0] // step)
        known = pyramid.keys[:, :, cells], None if pyramid.variance is None else pyramid.variance[:, :, cells]
    elif pyramid is not None and lanes == step == POOLED_CELL:
        known = pyramid.cells
    if known is None or (moments and known[1] is None):
        return _represent(k, layout.key_rows, step, lanes, variance=moments)
    return known


def _represent(
    x: Tensor, rows: Tensor, step: int, lanes: int, *, variance: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Mean of the real tokens of the first ``lanes`` of every ``step`` lanes: ``[B, H, len(rows) / step, D]``.

    With ``variance`` also their variance within the cell, the mean over channels: ``[B, H, len(rows) / step]``.
    """
    batch, heads, _, dim = x.shape
    num_cells = rows.shape[0] // step
    cells = torch.empty(batch, heads, num_cells, dim, dtype=x.dtype, device=x.device)
    variances = torch.empty(batch, heads, num_cells, dtype=torch.float32, device=x.device) if variance else None
    # eight channels a thread; where a cell is one token, a program takes more cells
    cells_a_program = max(1, (1024 if lanes > 1 else 4096) // padded(dim))
    with on_device(x):
        _represent_kernel[(cdiv(num_cells, cells_a_program), batch * heads)](
            x, rows, cells, variances if variance else cells, head_strides(x), heads, num_cells,
            HEAD_DIM=dim, D_PAD=padded(dim), CELLS=cells_a_program, STEP=step, LANES=lanes, VARIANCE=variance,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return cells, variances


def _spreads(q: Tensor, k: Tensor, layout: Layout, step: int, scale: float) -> Tensor:
    """What the scores of each query cell vary within a key cell whose key variance is 1: ``[B, H, cells]`` float32.

    ``½ s² log2(e) D q₁ᵀ S q₁ / tr S``, see `moment_importance` of `ops.reference`; the variance of a cell is the mean
    over channels, so D times it is the trace.
    """
    batch, heads, _, dim = q.shape
    num_cells = layout.query_rows.shape[0] // step
    parts = torch.empty(_SHAPE_SPLITS, batch * heads, dim, dim, dtype=torch.float32, device=q.device)
    shape = torch.empty(batch, heads, dim, dim, dtype=torch.float32, device=q.device)
    spreads = torch.empty(batch, heads, num_cells, dtype=torch.float32, device=q.device)
    size = padded(dim)
    with on_device(q):
        _shape_kernel[(_SHAPE_SPLITS, batch * heads)](
            k, layout.key_rows, parts, head_strides(k), heads, layout.key_rows.shape[0] // step,
            HEAD_DIM=dim, D_PAD=size, STEP=step, CELLS=max(1, 32 // step), STRIDE=SHAPE_STRIDE,
            num_warps=8 if size >= 128 else 4, enable_fp_fusion=True,
        )  # fmt: skip
        _add_shapes_kernel[(cdiv(dim * dim, 1024), batch * heads)](
            parts, shape, HEAD_DIM=dim, D_PAD=size, SPLITS=_SHAPE_SPLITS, SIZE=1024, num_warps=4, enable_fp_fusion=True
        )
        _spread_kernel[(cdiv(num_cells, 32), batch * heads)](
            q, layout.query_rows, shape, spreads, head_strides(q), heads, num_cells,
            0.5 * scale**2 * math.log2(math.e) * dim,
            HEAD_DIM=dim, D_PAD=size, STEP=step, ROWS=32, CHANNELS=min(size, 32), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return spreads


def _cell_weights(layout: Layout, step: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Tokens behind each query cell, and log2 of those behind each key cell, float32."""
    query_counts, key_counts = (
        (rows.view(-1, step)[:, :lanes] >= 0).sum(1).float() for rows in (layout.query_rows, layout.key_rows)
    )
    return query_counts, key_counts.log2()


@triton.jit(do_not_specialize=["num_cells"])
def _represent_kernel(
    x_ptr, rows_ptr, cells_ptr, variances_ptr,  # [B, H, L, D] [lanes] [B, H, cells, D] [B, H, cells]
    X_STRIDES, H, num_cells,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, CELLS: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
    VARIANCE: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(cells, CELLS), B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    o_c = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    x_head = x_ptr + (i_bh // H) * X_STRIDES[0] + (i_bh % H) * X_STRIDES[1]
    total = tl.zeros([CELLS, D_PAD], tl.float32)
    count = tl.zeros([CELLS], tl.float32)
    for i in tl.static_range(LANES):  # one token of each cell at a time: a thread adds up cells of its own
        rows = tl.load(rows_ptr + o_c * STEP + i, mask=o_c < num_cells, other=-1)
        total += load_rows(x_head, rows, rows >= 0, X_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
        count += (rows >= 0).to(tl.float32)
    mean = total / tl.maximum(count, 1.0)[:, None]
    tl.store(
        cells_ptr + (i_bh * num_cells + o_c)[:, None] * HEAD_DIM + o_d[None, :],
        mean.to(cells_ptr.dtype.element_ty),
        mask=(o_c < num_cells)[:, None] & (o_d < HEAD_DIM)[None, :],
    )
    if VARIANCE:
        # a second look at tokens that are in the cache: differences of squares would cancel
        away_sum = tl.zeros([CELLS], tl.float32)
        for i in tl.static_range(LANES):
            rows = tl.load(rows_ptr + o_c * STEP + i, mask=o_c < num_cells, other=-1)
            x = load_rows(x_head, rows, rows >= 0, X_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
            away = tl.where((rows >= 0)[:, None] & (o_d < HEAD_DIM)[None, :], x - mean, 0.0)
            away_sum += tl.sum(away * away, 1)
        tl.store(
            variances_ptr + i_bh * num_cells + o_c, away_sum / (tl.maximum(count, 1.0) * HEAD_DIM), mask=o_c < num_cells
        )


@triton.jit(do_not_specialize=["num_cells"])
def _shape_kernel(
    k_ptr, rows_ptr, parts_ptr,  # [B, H, L, D] [lanes] [SPLITS, B * H, D, D]
    K_STRIDES, H, num_cells,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr, CELLS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Within-cell key covariance of a head, summed over every STRIDE-th cell. Grid: (splits, B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    k_head = k_ptr + (i_bh // H) * K_STRIDES[0] + (i_bh % H) * K_STRIDES[1]
    o_d = tl.arange(0, D_PAD)
    o_t = tl.arange(0, CELLS * STEP)
    total = tl.zeros([D_PAD, D_PAD], tl.float32)
    first = tl.program_id(0) * (CELLS * STRIDE)
    for c in range(0, num_cells, tl.num_programs(0) * (CELLS * STRIDE)):
        cell = first + c + o_t // STEP * STRIDE
        rows = tl.load(rows_ptr + cell * STEP + o_t % STEP, mask=cell < num_cells, other=-1)
        b_k = load_rows(k_head, rows, rows >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
        real = tl.reshape((rows >= 0).to(tl.float32), (CELLS, STEP))
        mean = tl.sum(tl.reshape(b_k, (CELLS, STEP, D_PAD)), 1) / tl.maximum(tl.sum(real, 1), 1.0)[:, None]
        away = (tl.reshape(b_k, (CELLS, STEP, D_PAD)) - mean[:, None, :]) * real[:, :, None]
        away = tl.reshape(away, (CELLS * STEP, D_PAD)).to(k_ptr.dtype.element_ty)
        total = tl.dot(tl.trans(away), away, total, input_precision="ieee")
    i_part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + i_bh
    tl.store(
        parts_ptr + i_part * HEAD_DIM * HEAD_DIM + o_d[:, None] * HEAD_DIM + o_d[None, :],
        total,
        mask=(o_d < HEAD_DIM)[:, None] & (o_d < HEAD_DIM)[None, :],
    )


@triton.jit
def _add_shapes_kernel(
    parts_ptr, shape_ptr,  # [SPLITS, B * H, D * D] [B * H, D * D]
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The parts of a head added up and divided by the trace. Grid: (cdiv(D * D, SIZE), B * H)."""
    NUMBERS: tl.constexpr = HEAD_DIM * HEAD_DIM
    i_bh = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    diagonal = tl.zeros([D_PAD], tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts_ptr + (split * tl.num_programs(1) + i_bh) * NUMBERS
        total += tl.load(part + place, mask=place < NUMBERS, other=0.0)
        diagonal += tl.load(part + o_d * (HEAD_DIM + 1), mask=o_d < HEAD_DIM, other=0.0)
    trace = tl.maximum(tl.sum(diagonal, 0), 1.1754943508222875e-38)
    tl.store(shape_ptr + i_bh * NUMBERS + place, total / trace, mask=place < NUMBERS)


@triton.jit(do_not_specialize=["num_cells"])
def _spread_kernel(
    q_ptr, rows_ptr, shape_ptr, spreads_ptr,  # [B, H, L, D] [lanes] [B, H, D, D] [B, H, cells]
    Q_STRIDES, H, num_cells, scale,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Quadratic form of the first query of every cell. Grid: (cdiv(cells, ROWS), B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    q_head = q_ptr + (i_bh // H) * Q_STRIDES[0] + (i_bh % H) * Q_STRIDES[1]
    o_d = tl.arange(0, D_PAD)
    o_c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(rows_ptr + o_c * STEP, mask=o_c < num_cells, other=-1)
    b_q = load_rows(q_head, rows, rows >= 0, Q_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32)
    product = tl.zeros([ROWS, D_PAD], tl.float32)
    for channel in range(0, HEAD_DIM, CHANNELS):  # CHANNELS rows of the matrix at a time fit any chip
        o_k = channel + tl.arange(0, CHANNELS)
        part = load_rows(q_head, rows, rows >= 0, Q_STRIDES[2], o_k, HEAD_DIM, CHANNELS).to(tl.float32)
        b_s = load_rows(shape_ptr + i_bh * HEAD_DIM * HEAD_DIM, o_k, o_k < HEAD_DIM, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
        product = tl.dot(part, b_s, product, input_precision="ieee")
    tl.store(spreads_ptr + i_bh * num_cells + o_c, tl.sum(product * b_q, 1) * scale, mask=o_c < num_cells)


@triton.jit(do_not_specialize=["num_q", "num_k", "M", "N", "work"])
def _importance_kernel(
    q_ptr, k_ptr, weights_ptr, bias_ptr,           # [B, H, num_q, D] [B, H, num_k, D] [num_q] [num_k]
    spreads_ptr, variances_ptr, out_ptr,           # [B, H, num_q] [B, H, num_k], only with MOMENTS; [B, H, M, N]
    scratch_ptr,                                   # [programs, tiles, ROWS * (BLOCKS + 1)]
    K_STRIDES, VARIANCE_STRIDES,                   # batch, head
    H, num_q, num_k, M, N, work, qk_scale, cap,    # work = cdiv(num_q, ROWS) * B * H; qk_scale = scale * log2(e) > 0
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,     # query cells, key cells of a tile
    PER_M: tl.constexpr, PER_N: tl.constexpr,      # cells a query block, cells a key block
    TILES: tl.constexpr,                           # tiles read back at a time
    MASS: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """Several query blocks against all keys, once: what a row gives to the key blocks waits until its sum is known.

    It waits in memory that this program alone writes and reads, again and again, to stay in the cache if it fits. A
    record of a tile has the sums (or maxima) over its blocks ``[ROWS, BLOCKS]``, relative to the largest score that
    each row has met by then, and these scores ``[ROWS]``. Grid: any number of programs; every row is one program's
    alone, so the number changes no bit.
    """
    BLOCKS: tl.constexpr = COLUMNS // PER_N
    GROUPS: tl.constexpr = ROWS // PER_M  # query blocks
    RECORD: tl.constexpr = ROWS * (BLOCKS + 1)
    row_tiles = tl.cdiv(num_q, ROWS)
    unit = 1.0 if MOMENTS else qk_scale  # of what b_s holds
    one_over_scale = 1.0 / qk_scale
    o_d = tl.arange(0, D_PAD)
    # the matrix units leave every fourth pair of columns to a thread: in this order a thread has blocks of its own
    SHARES: tl.constexpr = 4 if BLOCKS > 4 else BLOCKS
    PAIR: tl.constexpr = 8 // SHARES if PER_N > 8 // SHARES else PER_N
    o_c = tl.arange(0, COLUMNS)
    o_c = (o_c // PAIR % SHARES * (BLOCKS // SHARES) + o_c // (SHARES * PER_N)) * PER_N + (
        o_c // (SHARES * PAIR) % (PER_N // PAIR) * PAIR + o_c % PAIR
    )
    o_r = tl.arange(0, ROWS)
    o_b = tl.arange(0, BLOCKS)
    o_t = tl.arange(0, TILES)
    # rows are read back in this order, those of a query block GROUPS apart: a thread adds up rows of its own
    turned = o_r % GROUPS * PER_M + o_r // GROUPS
    scratch_ptr += tl.program_id(0).to(tl.int64) * (tl.cdiv(num_k, COLUMNS * TILES) * TILES) * RECORD
    parts = o_r[:, None] * BLOCKS + o_b[None, :]
    turned_parts = turned[:, None, None] * BLOCKS + o_t[None, :, None] * RECORD + o_b[None, None, :]
    turned_peaks = turned[:, None] + (o_t * RECORD + ROWS * BLOCKS)[None, :]

    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        i_r = item % row_tiles
        i_bh = (item // row_tiles).to(tl.int64)
        k_head = k_ptr + (i_bh // H) * K_STRIDES[0] + (i_bh % H) * K_STRIDES[1]
        v_head = variances_ptr + (i_bh // H) * VARIANCE_STRIDES[0] + (i_bh % H) * VARIANCE_STRIDES[1]
        rows = i_r * ROWS + o_r
        b_q = load_rows(q_ptr + i_bh * num_q * HEAD_DIM, rows, rows < num_q, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
        spread = tl.zeros([ROWS], tl.float32)
        if MOMENTS:
            spread = tl.load(spreads_ptr + i_bh * num_q + rows, mask=rows < num_q, other=0.0)

        b_max = tl.full([ROWS], float("-inf"), tl.float32)
        b_sum = tl.zeros([ROWS], tl.float32)
        record = scratch_ptr
        # what a column has of its own is looked up a tile ahead: products start from it
        bias = tl.load(bias_ptr + o_c, mask=o_c < num_k, other=float("-inf")) * one_over_scale
        variance = tl.load(v_head + o_c, mask=o_c < num_k, other=0.0) if MOMENTS else bias
        for t in range(0, num_k, COLUMNS):
            columns = t + o_c
            b_k = load_rows(k_head, columns, columns < num_k, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
            b_s = tl.broadcast_to(bias[None, :], (ROWS, COLUMNS))
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
            if MOMENTS:
                b_s = b_s * qk_scale + tl.minimum(spread[:, None] * variance[None, :], cap)
            columns += COLUMNS
            bias = tl.load(bias_ptr + columns, mask=columns < num_k, other=float("-inf")) * one_over_scale
            variance = tl.load(v_head + columns, mask=columns < num_k, other=0.0) if MOMENTS else bias
            new_max = tl.maximum(b_max, tl.max(b_s, 1) * unit)
            # finite pivot while a row has seen no key, otherwise -inf - (-inf) = nan
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            b_p = tl.exp2(b_s * unit - pivot[:, None])
            of_rows = tl.reshape(b_p, (ROWS, BLOCKS // SHARES, PER_N // PAIR, SHARES, PAIR))
            of_rows = tl.sum(tl.sum(of_rows, 4), 2) if MASS else tl.max(tl.max(of_rows, 4), 2)
            of_rows = tl.reshape(tl.trans(of_rows, 0, 2, 1), (ROWS, BLOCKS))
            b_sum = b_sum * tl.exp2(b_max - pivot) + tl.sum(of_rows if MASS else b_p, 1)
            b_max = new_max
            tl.store(record + parts, of_rows)
            tl.store(record + ROWS * BLOCKS + o_r, new_max)  # not the pivot: 2 ** (0 - sum) may be inf
            record += RECORD
        log_sum = b_max + tl.log2(b_sum)

        log_sum = tl.reshape(tl.trans(tl.reshape(log_sum, (GROUPS, PER_M))), (ROWS,))
        rows = i_r * ROWS + turned
        weight = tl.load(weights_ptr + rows, mask=rows < num_q, other=0.0)
        # 0, or NaN if a query of the block is not finite or met a key that is not: a maximum would hide it
        alarm = tl.sum(tl.reshape(tl.where(weight > 0, log_sum - log_sum, 0.0), (PER_M, GROUPS)), 0)
        share = tl.reshape(weight, (PER_M, GROUPS))
        share = tl.reshape(share / tl.maximum(tl.sum(share, 0), 1.0)[None, :], (ROWS,)) if MASS else weight
        block_m = i_r * GROUPS + tl.arange(0, GROUPS)
        out_rows = out_ptr + (i_bh * M + block_m) * N
        tl.debug_barrier()  # the threads that read are not those that wrote
        record = scratch_ptr
        for t in range(0, N, TILES * BLOCKS):
            factor = tl.exp2(tl.load(record + turned_peaks) - log_sum[:, None])
            factor = factor * share[:, None] if MASS else factor
            b_p = tl.where((weight > 0)[:, None, None], tl.load(record + turned_parts) * factor[:, :, None], 0.0)
            b_p = tl.reshape(b_p, (PER_M, GROUPS, TILES, BLOCKS))
            of_blocks = tl.sum(b_p, 0) if MASS else tl.max(b_p, 0)
            block_n = t + o_t[:, None] * BLOCKS + o_b[None, :]
            tl.store(
                out_rows[:, None, None] + block_n[None, :, :],
                of_blocks + alarm[:, None, None],
                mask=(block_m < M)[:, None, None] & (block_n < N)[None, :, :],
            )
            record += TILES * RECORD
        tl.debug_barrier()  # before another thread writes what this one still reads
