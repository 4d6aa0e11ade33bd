"""Stage 4: an estimate of how much attention each block of queries pays to each block of keys."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.kernels.launch import head_strides, load_rows, on_device, padded, remember
from psa_diffusers.kernels.tuning import importance_launch
from psa_diffusers.layout import Layout
from psa_diffusers.stages.importance import POOLED_CELL, SAMPLE_STRIDE


def block_importance(q: Tensor, k: Tensor, layout: Layout, method: str, scale: float) -> Tensor:
    """Estimate the importance of every key block for every query block. See `psa_diffusers.stages.importance`.

    Args:
        q: Queries ``[B, H, L, D]``, tokens as the model has them; any strides with contiguous channels.
        k: Keys ``[B, H, L, D]``.
        layout: Where tokens stand.
        method: ``pooled_mass`` or ``sampled_max``.
        scale: Softmax scale.

    Returns:
        ``[B, H, M, N]`` float32, not negative; NaN where a query or key is not finite.
    """
    mass = method == "pooled_mass"
    # a cell is `step` lanes wide and represented by the mean of its first `lanes` lanes
    step = min(POOLED_CELL, layout.block_m, layout.block_n) if mass else SAMPLE_STRIDE
    lanes = step if mass else 1
    cells_q = _represent(q, layout.query_rows, step, lanes)
    cells_k = _represent(k, layout.key_rows, step, lanes)
    weights, bias = remember(layout, ("cells", step, lanes), lambda: _cell_weights(layout, step, lanes))

    batch, heads, num_q, dim = cells_q.shape
    num_blocks_q, num_blocks_k = layout.num_query_blocks, layout.num_key_blocks
    per_m, per_n = layout.block_m // step, layout.block_n // step
    launch = importance_launch(dim, q.element_size(), q.device)
    rows, columns = max(launch.rows, per_m), max(launch.columns, per_n)
    importance = torch.empty(batch, heads, num_blocks_q, num_blocks_k, dtype=torch.float32, device=q.device)
    with on_device(q):
        _importance_kernel[(triton.cdiv(num_q, rows), batch * heads)](
            cells_q, cells_k, weights, bias, importance,
            num_q, cells_k.shape[2], num_blocks_q, num_blocks_k, scale * math.log2(math.e),
            HEAD_DIM=dim, D_PAD=padded(dim), ROWS=rows, COLUMNS=columns, PER_M=per_m, PER_N=per_n, MASS=mass,
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return importance


def _represent(x: Tensor, rows: Tensor, step: int, lanes: int) -> Tensor:
    """Mean of the real tokens of the first ``lanes`` of every ``step`` lanes: ``[B, H, len(rows) / step, D]``."""
    batch, heads, _, dim = x.shape
    num_cells = rows.shape[0] // step
    cells = torch.empty(batch, heads, num_cells, dim, dtype=x.dtype, device=x.device)
    # eight channels a thread; where a cell is one token, a program takes more cells
    cells_a_program = max(1, (1024 if lanes > 1 else 4096) // padded(dim))
    with on_device(x):
        _represent_kernel[(triton.cdiv(num_cells, cells_a_program), batch * heads)](
            x, rows, cells, head_strides(x), heads, num_cells,
            HEAD_DIM=dim, D_PAD=padded(dim), CELLS=cells_a_program, STEP=step, LANES=lanes,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return cells


def _cell_weights(layout: Layout, step: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Tokens that stand behind each query cell, and log2 of those behind each key cell, float32."""
    query_counts, key_counts = (
        (rows.view(-1, step)[:, :lanes] >= 0).sum(1).float() for rows in (layout.query_rows, layout.key_rows)
    )
    return query_counts, key_counts.log2()


@triton.jit(do_not_specialize=["num_cells"])
def _represent_kernel(
    x_ptr, rows_ptr, cells_ptr,  # [B, H, L, D] [lanes] [B, H, cells, D]
    X_STRIDES, H, num_cells,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, CELLS: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
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


@triton.jit(do_not_specialize=["num_q", "num_k", "M", "N"])
def _importance_kernel(
    q_ptr, k_ptr, weights_ptr, bias_ptr, out_ptr,  # [B, H, num_q, D] [B, H, num_k, D] [num_q] [num_k] [B, H, M, N]
    num_q, num_k, M, N, qk_scale,                  # qk_scale = softmax scale * log2(e)
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,     # query cells a program, key cells an iteration
    PER_M: tl.constexpr, PER_N: tl.constexpr,      # cells a query block, cells a key block
    MASS: tl.constexpr,
):  # fmt: skip
    """Several query blocks against all keys, twice: for the sum of every row, then for the weights.

    Grid: (cdiv(num_q, ROWS), B * H). Nothing the size of the scores leaves the chip.
    """
    i_r = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    q_ptr += i_bh * num_q * HEAD_DIM
    k_ptr += i_bh * num_k * HEAD_DIM
    out_ptr += i_bh * M * N
    o_d = tl.arange(0, D_PAD)
    o_c = tl.arange(0, COLUMNS)
    o_r = i_r * ROWS + tl.arange(0, ROWS)
    b_q = load_rows(q_ptr, o_r, o_r < num_q, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
    weight = tl.load(weights_ptr + o_r, mask=o_r < num_q, other=0.0)

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for t in range(0, num_k, COLUMNS):
        b_s = _scores(b_q, k_ptr, bias_ptr, t + o_c, num_k, o_d, qk_scale, HEAD_DIM, D_PAD)
        new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # finite pivot while a row has seen no key, otherwise -inf - (-inf) = nan
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        b_sum = b_sum * tl.exp2(b_max - pivot) + tl.sum(tl.exp2(b_s - pivot[:, None]), 1)
        b_max = new_max
    log_sum = b_max + tl.log2(b_sum)

    block_m = i_r * (ROWS // PER_M) + tl.arange(0, ROWS // PER_M)
    block_weight = tl.sum(tl.reshape(weight, (ROWS // PER_M, PER_M)), 1)
    # 0, or NaN if a query of the block is not finite or met a key that is not: a maximum would hide it
    alarm = tl.sum(tl.reshape(tl.where(weight > 0, log_sum - log_sum, 0.0), (ROWS // PER_M, PER_M)), 1)
    for t in range(0, num_k, COLUMNS):
        b_s = _scores(b_q, k_ptr, bias_ptr, t + o_c, num_k, o_d, qk_scale, HEAD_DIM, D_PAD)
        b_p = tl.reshape(tl.exp2(b_s - log_sum[:, None]), (ROWS, COLUMNS // PER_N, PER_N))
        if MASS:
            of_rows = tl.where(weight[:, None] > 0, tl.sum(b_p, 2), 0.0) * weight[:, None]
            of_blocks = tl.sum(tl.reshape(of_rows, (ROWS // PER_M, PER_M, COLUMNS // PER_N)), 1)
            of_blocks = of_blocks / tl.maximum(block_weight, 1.0)[:, None]
        else:
            of_rows = tl.where(weight[:, None] > 0, tl.max(b_p, 2), 0.0)
            of_blocks = tl.max(tl.reshape(of_rows, (ROWS // PER_M, PER_M, COLUMNS // PER_N)), 1)
        block_n = t // PER_N + tl.arange(0, COLUMNS // PER_N)
        tl.store(
            out_ptr + block_m.to(tl.int64)[:, None] * N + block_n[None, :],
            of_blocks + alarm[:, None],
            mask=(block_m < M)[:, None] & (block_n < N)[None, :],
        )


@triton.jit
def _scores(b_q, k_ptr, bias_ptr, columns, num_k, o_d, qk_scale, HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr):
    """Scores of one tile in base 2, ``[ROWS, COLUMNS]``; -inf where no token stands behind a key cell."""
    b_k = load_rows(k_ptr, columns, columns < num_k, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
    bias = tl.load(bias_ptr + columns, mask=columns < num_k, other=float("-inf"))
    return tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * qk_scale + bias[None, :]
