"""Stage 7: attention of every query block over the cells its schedule lists, in one online softmax."""

import logging
import math
from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.triton.launch import (
    head_strides,
    load_rows,
    next_power_of_2,
    on_device,
    pack_factors,
    padded,
    wait_for,
)
from psa_diffusers.ops.triton.tuning import attend_launch, matrix_unit
from psa_diffusers.ops.types import KEY_VARIANCE_CAP, Pyramid, Schedule

LOG2E = tl.constexpr(math.log2(math.e))

logger = logging.getLogger("psa_diffusers")


def attend(
    q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, schedule: Schedule, layout: Layout, scale: float
) -> Tensor:
    """Read each kept block at its factor, as in `ops.reference`; empty cells of the pyramid must be zero."""
    batch, heads, _, dim = q.shape
    wait_for(pyramid.ready, pyramid.covariance)
    if (hopper := hopper_kernel(q.device)) and hopper.takes(q, k, v, layout, schedule, scale):
        return hopper.attend(q, k, v, pyramid, schedule, layout, scale)
    out = torch.empty_like(q)
    launch = attend_launch(dim, q.element_size(), layout.block_m, q.device)
    parts = max(1, layout.block_m // launch.rows)
    log2e = math.log2(math.e)
    unused = pyramid.log_counts
    tf32 = q.dtype == torch.float16 and not torch.version.hip
    with on_device(q):
        _attend_kernel[(layout.num_query_blocks * parts, batch * heads)](
            q, k, v, out,
            pyramid.keys, pyramid.values, pyramid.log_counts,
            unused if pyramid.variance is None else pyramid.variance,
            unused if pyramid.covariance is None else pyramid.covariance,
            schedule.block_ids, schedule.offsets, layout.query_rows, layout.key_rows,
            head_strides(q), head_strides(k), head_strides(v), head_strides(out),
            heads, layout.num_query_blocks, layout.num_key_blocks, pyramid.keys.shape[2],
            len(schedule.factors), pack_factors(schedule.factors),
            scale, scale * log2e, 0.5 * scale**2 * log2e, KEY_VARIANCE_CAP * log2e,
            HEAD_DIM=dim, D_PAD=padded(dim), BLOCK_M=layout.block_m, BLOCK_N=layout.block_n,
            ROWS=launch.rows, PARTS=parts, TILE_N=launch.tile_n,
            KEY_VARIANCE=pyramid.variance is not None, VALUE_TILT=pyramid.covariance is not None,
            TILT_STEP=min(padded(dim), 32), TILT_PRECISION="tf32" if tf32 else "ieee",
            MAX_FACTORS=max(2, next_power_of_2(len(schedule.factors))),
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@cache
def hopper_kernel(device: torch.device) -> ModuleType | None:
    """The module with the kernel for Hopper, where the chip and the Triton at hand have what it needs."""
    if device.type != "cuda" or matrix_unit(device) != "wgmma":
        return None
    try:
        from psa_diffusers.ops.triton import attend_hopper
    except (ImportError, AttributeError) as error:
        logger.warning(
            "PSA uses its general kernel, which is slower on this GPU: Triton %s, %s", triton.__version__, error
        )
        return None
    return attend_hopper


@triton.jit(do_not_specialize=["num_rows", "num_factors", "packed_factors"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,                  # [B, H, L, D]
    keys_ptr, values_ptr, log_counts_ptr,        # [B, H, P, D] [B, H, P, D] [P]
    variance_ptr, covariance_ptr,                # [B, H, P] [B, H, F, D, D]; not read when the term is off
    block_ids_ptr, offsets_ptr,                  # [B, H, M, N] [B, H, M, F + 1]
    query_rows_ptr, key_rows_ptr,                # [M * BLOCK_M] [N * BLOCK_N], -1 = no token
    Q_STRIDES, K_STRIDES, V_STRIDES, O_STRIDES,  # batch, head, token
    H, M, N, num_rows, num_factors, packed_factors,
    scale, qk_scale, norm_scale, bias_cap,       # softmax scale s, s log2(e), s^2/2 log2(e), cap log2(e)
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, TILE_N: tl.constexpr,
    KEY_VARIANCE: tl.constexpr, VALUE_TILT: tl.constexpr,
    TILT_STEP: tl.constexpr, TILT_PRECISION: tl.constexpr, MAX_FACTORS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one query block against the block's lists, factor by factor, in one online softmax in base 2.

    Grid: (M * PARTS, B * H).
    """
    i_m = tl.program_id(0) // PARTS
    # int64 before it meets a stride: B * H * L * D passes 2**31 at 720p
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    q_ptr += i_b * Q_STRIDES[0] + i_h * Q_STRIDES[1]
    k_ptr += i_b * K_STRIDES[0] + i_h * K_STRIDES[1]
    v_ptr += i_b * V_STRIDES[0] + i_h * V_STRIDES[1]
    o_ptr += i_b * O_STRIDES[0] + i_h * O_STRIDES[1]
    keys_ptr += i_bh * num_rows * HEAD_DIM
    values_ptr += i_bh * num_rows * HEAD_DIM
    variance_ptr += i_bh * num_rows
    covariance_ptr += i_bh * num_factors * HEAD_DIM * HEAD_DIM
    block_ids_ptr += (i_bh * M + i_m) * N
    offsets_ptr += (i_bh * M + i_m) * (num_factors + 1)
    query_rows_ptr += i_m * BLOCK_M

    o_d = tl.arange(0, D_PAD)
    o_t = tl.arange(0, TILE_N)
    o_m = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    query_rows = tl.load(query_rows_ptr + o_m, mask=o_m < BLOCK_M, other=-1)
    b_q = load_rows(q_ptr, query_rows, query_rows >= 0, Q_STRIDES[2], o_d, HEAD_DIM, D_PAD)
    spread_scale = 0.0
    if KEY_VARIANCE:
        norm = _mean_square(q_ptr, query_rows_ptr, Q_STRIDES[2], o_d, HEAD_DIM, D_PAD, BLOCK_M, ROWS, PARTS)
        spread_scale = norm_scale * norm

    b_o = tl.zeros([ROWS, D_PAD], tl.float32)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_before = tl.zeros([ROWS], tl.float32)  # b_sum is the mass of the factor at hand, this that of those before it
    o_f = tl.arange(0, MAX_FACTORS)
    b_mass = tl.full([ROWS, MAX_FACTORS], float("-inf"), tl.float32)  # log2 of the mass of every factor

    num_lanes = tl.load(offsets_ptr + 1) * BLOCK_N
    for t in range(0, num_lanes, TILE_N):
        lane = t + o_t
        if BLOCK_N % TILE_N == 0:
            block = tl.load(block_ids_ptr + t // BLOCK_N).to(tl.int32)  # one block holds the whole tile
        else:
            block = tl.load(block_ids_ptr + lane // BLOCK_N, mask=lane < num_lanes, other=0).to(tl.int32)
        row = tl.load(key_rows_ptr + block * BLOCK_N + lane % BLOCK_N, mask=lane < num_lanes, other=-1)
        b_k = load_rows(k_ptr, row, row >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD)
        b_v = load_rows(v_ptr, row, row >= 0, V_STRIDES[2], o_d, HEAD_DIM, D_PAD)
        bias = tl.where(row >= 0, 0.0, float("-inf"))
        b_o, b_max, b_sum, b_before = _fold(b_q, b_k, b_v, bias, b_o, b_max, b_sum, b_before, qk_scale)

    base = 0
    for f in range(1, num_factors):
        b_before += b_sum
        b_sum = tl.zeros([ROWS], tl.float32)
        log2_factor = (packed_factors >> (4 * f)) & 15
        num_cells = BLOCK_N >> log2_factor  # of a block, a power of two
        start = tl.load(offsets_ptr + f)
        num_lanes = (tl.load(offsets_ptr + f + 1) - start) * num_cells
        for t in range(0, num_lanes, TILE_N):
            lane = t + o_t
            # a tile may span several blocks: every lane looks up its own
            slot = (lane << log2_factor) // BLOCK_N
            real = lane < num_lanes
            block = tl.load(block_ids_ptr + start + slot, mask=real, other=0).to(tl.int32)
            row = base + block * num_cells + (lane & (num_cells - 1))
            b_k = load_rows(keys_ptr, row, real, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
            b_v = load_rows(values_ptr, row, real, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
            # log(count), not log(factor): a ragged tail averages fewer real tokens, and an empty cell none
            bias = tl.load(log_counts_ptr + row, mask=real, other=float("-inf")) * LOG2E
            if KEY_VARIANCE:
                spread = tl.load(variance_ptr + row, mask=real, other=0.0)
                spread = tl.where(spread < float("inf"), spread, 0.0)  # false for NaN too
                bias += tl.minimum(spread_scale * spread, bias_cap)
            b_o, b_max, b_sum, b_before = _fold(b_q, b_k, b_v, bias, b_o, b_max, b_sum, b_before, qk_scale)
        if VALUE_TILT:
            # a factor that gets nothing keeps -inf, without a logarithm of 0
            mass = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
            b_mass = tl.where(o_f[None, :] == f, mass[:, None], b_mass)
        base += N * num_cells

    # a row that keeps nothing is 0; 0 / 0 of a row whose weights all vanish stays NaN, as in dense attention
    kept = tl.load(offsets_ptr + num_factors)
    b_sum = tl.where(kept > 0, b_before + b_sum, 1.0)
    b_o = b_o / b_sum[:, None]
    if VALUE_TILT:
        b_total = tl.where(kept > 0, b_max + tl.log2(b_sum), 0.0)
        b_share = tl.exp2(b_mass - b_total[:, None]) * scale
        b_o = _add_tilt(
            b_o, b_share, q_ptr, query_rows, Q_STRIDES[2], covariance_ptr, offsets_ptr, num_factors,
            HEAD_DIM, D_PAD, TILT_STEP, TILT_PRECISION, MAX_FACTORS,
        )  # fmt: skip
    o_ptrs = o_ptr + query_rows.to(tl.int64)[:, None] * O_STRIDES[2] + o_d[None, :]
    tl.store(o_ptrs, b_o.to(o_ptr.dtype.element_ty), mask=(query_rows >= 0)[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def _fold(b_q, b_k, b_v, bias, b_o, b_max, b_sum, b_before, qk_scale):
    """Take one tile of cells into the running softmax: scores in base 2, everything relative to the running maximum."""
    # [ROWS, TILE_N]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * qk_scale + bias[None, :]
    new_max = tl.maximum(b_max, tl.max(b_s, 1))
    # finite pivot while a row has seen no cell, otherwise -inf - (-inf) = nan
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_p = tl.exp2(b_s - pivot[:, None])
    decay = tl.exp2(b_max - pivot)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * decay[:, None], input_precision="ieee")
    return b_o, new_max, b_sum * decay + tl.sum(b_p, 1), b_before * decay


@triton.jit
def _mean_square(
    q_ptr, query_rows_ptr, stride, o_d,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean of the squared norms over the real queries of the block; a norm that is not finite counts as 0."""
    o_m = tl.arange(0, ROWS)
    total = 0.0
    number = 0.0
    for part in range(PARTS):
        rows = tl.load(query_rows_ptr + part * ROWS + o_m, mask=o_m < BLOCK_M, other=-1)
        b_q = load_rows(q_ptr, rows, rows >= 0, stride, o_d, D, D_PAD).to(tl.float32)
        norms = tl.sum(b_q * b_q, 1)
        total += tl.sum(tl.where(norms < float("inf"), norms, 0.0))
        number += tl.sum((rows >= 0).to(tl.float32))
    return total / number


@triton.jit
def _add_tilt(
    b_o, b_share, q_ptr, rows, stride, covariance_ptr, offsets_ptr, num_factors,
    D: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, MAX_FACTORS: tl.constexpr,
):  # fmt: skip
    """Add sum over the pooled factors f of share_rf q_r C_f, STEP rows of C at a time.

    After the softmax, not in it: a third product inside the loop would force its own layout on the accumulator.
    """
    o_d = tl.arange(0, D_PAD)
    o_f = tl.arange(0, MAX_FACTORS)
    steps = tl.cdiv(D, STEP)
    for i in range(steps, num_factors * steps):
        f = i // steps
        channel = (i % steps) * STEP + tl.arange(0, STEP)
        # a covariance of NaN counts only where its factor was read
        limit = tl.where(tl.load(offsets_ptr + f + 1) > tl.load(offsets_ptr + f), D, 0)
        b_q = load_rows(q_ptr, rows, rows >= 0, stride, channel, D, STEP)
        b_c = load_rows(covariance_ptr + f * D * D, channel, channel < limit, D, o_d, D, D_PAD)
        weight = tl.sum(tl.where(o_f[None, :] == f, b_share, 0.0), 1)
        wide = b_q.to(tl.float32) * weight[:, None]
        if b_q.dtype == tl.bfloat16:
            b_o = tl.dot(wide.to(tl.bfloat16), b_c.to(tl.bfloat16), b_o)
        else:
            b_o = tl.dot(wide, b_c, b_o, input_precision=PRECISION)  # a covariance may exceed float16
    return b_o
