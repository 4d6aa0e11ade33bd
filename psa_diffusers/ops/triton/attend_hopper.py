"""Stage 7 on Hopper: `psa_diffusers.ops.triton.attend` with one group of warps that fetches and two that compute.

What Triton's own pipeline cannot do makes it faster: the addresses of a tile are looked up two tiles ahead by warps
that have nothing else to do, the two groups take turns so that one multiplies while the other makes weights, and the
next rows begin while the last ones end. docs/developer/kernel.md explains it.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.triton.launch import head_strides, on_device, pack_factors
from psa_diffusers.ops.types import KEY_VARIANCE_CAP, Pyramid, Schedule

BLOCKS_M = (64, 128)  # queries of a program: 64 for each group of warps that computes
HEAD_DIMS = (64, 128)
MOST_FACTORS = 8
LEAST_SCALE = 1e-3

# from ptxas 13 on, products side by side must fit the registers that a thread starts with
_ASSEMBLER_COUNTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)
# renamed between Triton 3.6 and 3.9
_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def takes(q: Tensor, k: Tensor, v: Tensor, layout: Layout, schedule: Schedule, scale: float) -> bool:
    """Whether this kernel can do it. What it leaves to the general one is rare or small."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in HEAD_DIMS
        and layout.block_m in BLOCKS_M
        and layout.block_n <= 128
        and len(schedule.factors) <= MOST_FACTORS
        # biases travel in half precision, in the unit of a product of query and key
        and scale >= LEAST_SCALE
        # 16 bytes are copied at a time
        and all(x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in head_strides(x)) for x in (q, k, v))
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, schedule: Schedule, layout: Layout, scale: float
) -> Tensor:
    """Read each kept block at its factor, as `ops.triton.attend` does, where `takes` agrees."""
    batch, heads, _, dim = q.shape
    out = torch.empty_like(q)
    log2e = math.log2(math.e)
    num_factors = len(schedule.factors)
    key_variance, value_tilt = pyramid.variance is not None, pyramid.covariance is not None
    covariance, sizes = _halve(pyramid.covariance, q.dtype) if value_tilt else (q, pyramid.log_counts)
    # one group that computes: half of the room and of the registers, so that two programs share a multiprocessor
    alone = layout.block_m == 64
    tile = 64 if alone and (dim == 128 or _ASSEMBLER_COUNTS) else 128
    keys_in_flight = 2**14 if alone else 2**15  # numbers; as many values
    with on_device(q):
        programs = (1 + alone) * torch.cuda.get_device_properties(q.device).multi_processor_count
        work = layout.num_query_blocks * batch * heads
        _attend_kernel[(min(programs, work),)](
            q, k, v, out,
            pyramid.keys, pyramid.values, pyramid.log_counts,
            pyramid.variance if key_variance else pyramid.log_counts, covariance, sizes,
            schedule.block_ids, schedule.offsets, layout.query_rows, layout.key_rows,
            torch.zeros(1, dtype=torch.int32, device=q.device),
            *head_strides(q), *head_strides(k), *head_strides(v), *head_strides(out),
            heads, layout.num_query_blocks, layout.num_key_blocks, pyramid.keys.shape[2], work,
            _pack_cells(schedule.factors, layout.block_n), _pack_bases(schedule.factors, layout.block_n),
            (layout.num_key_blocks - layout.video_key_blocks + 1) * layout.block_n,
            scale, scale * log2e, 1 / scale, 0.5 * scale**2, KEY_VARIANCE_CAP,
            D=dim, BLOCK_M=layout.block_m, BLOCK_N=layout.block_n, TILE=tile, STAGES=keys_in_flight // (tile * dim),
            F=num_factors,
            KEY_VARIANCE=key_variance, VALUE_TILT=value_tilt, SIZED=q.dtype == torch.float16,
            WIDE=max(q.shape[2] * x.stride(2) for x in (q, k, v)) >= 2**31,
            APART=dim == 128 and _ASSEMBLER_COUNTS, COMPUTE_REGISTERS=216, FETCH_REGISTERS=80,
            num_warps=4, maxnreg=128 if alone else None, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _halve(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The covariance in half precision, and the power of two ``[B, H, F]`` that was taken out for float16."""
    if dtype == torch.bfloat16:
        return covariance.to(dtype), covariance
    largest = covariance.abs().amax((-1, -2))
    sizes = torch.exp2(largest.clamp(2.0**-100, 2.0**100).log2().ceil())
    return (covariance / sizes[..., None, None]).to(dtype), sizes


def _pack_cells(factors: tuple[int, ...], block_n: int) -> int:
    """log2 of the cells of a block at every factor, four bits each, the first lowest."""
    return pack_factors(tuple(block_n // factor for factor in factors))


def _pack_bases(factors: tuple[int, ...], block_n: int) -> int:
    """Cells of a block at the pooled factors before this one, eight bits each, the first factor lowest."""
    packed, before = 0, 0
    for f, factor in enumerate(factors):
        packed |= before << (8 * f)
        before += block_n // factor if factor > 1 else 0
    return packed - (packed >> 63 << 64)  # as a signed integer of 64 bits


@gluon.jit
def _lists(offsets_ptr, packed_cells, F: gl.constexpr):
    """For every factor: where its list begins and how long it is, both counted in cells."""
    begins = ()
    lanes = ()
    for f in gl.static_range(F):
        begin = gl.load(offsets_ptr + f)
        end = gl.load(offsets_ptr + f + 1)
        log2_cells = (packed_cells >> (4 * f)) & 15
        begins = begins + (begin << log2_cells,)
        lanes = lanes + ((end - begin) << log2_cells,)
    return begins, lanes


@gluon.jit
def _list_of(i, M):
    """Which of the lists ``[B, H, M]`` a piece of work reads: the last query blocks, those of text, come first."""
    return (i // M).to(gl.int64) * M + (M - 1 - i % M)


@gluon.jit
def _first_rows(total, ids_ptr, key_rows_ptr, o_l, BLOCK_N: gl.constexpr, TILE: gl.constexpr):
    """Rows of the first tile at factor 1, and the blocks of the second."""
    block = gl.load(ids_ptr + o_l // BLOCK_N, mask=o_l < total, other=0).to(gl.int32)
    row = gl.load(key_rows_ptr + block * BLOCK_N + o_l % BLOCK_N, mask=o_l < total, other=-1)
    block = gl.load(ids_ptr + (o_l + TILE) // BLOCK_N, mask=o_l + TILE < total, other=0).to(gl.int32)
    return row, block


@gluon.jit
def _segments(begins, lanes, TILE: gl.constexpr, F: gl.constexpr):
    """The order in which pooled cells are read: whole tiles of each factor, then what is left of each, end to end.

    Returns the first lane of the 2 (F - 1) segments, what to add to a lane for its place in the lists, and all lanes.
    """
    starts = ()
    shifts = ()
    start = 0
    for f in gl.static_range(1, F):
        starts = starts + (start,)
        shifts = shifts + (begins[f] - start,)
        start += lanes[f] // TILE * TILE
    for f in gl.static_range(1, F):
        starts = starts + (start,)
        shifts = shifts + (begins[f] + lanes[f] // TILE * TILE - start,)
        start += lanes[f] % TILE
    return starts, shifts, start


@gluon.jit
def _find(lane, total, starts, shifts, ids_ptr, packed_cells, F: gl.constexpr):
    """Factor index, cell and block of pooled lanes."""
    f = gl.full_like(lane, 1)
    place = lane + shifts[0]
    for e in gl.static_range(1, 2 * (F - 1)):
        inside = lane >= starts[e]
        f = gl.where(inside, e % (F - 1) + 1, f)
        place = gl.where(inside, lane + shifts[e], place)
    log2_cells = (packed_cells >> (4 * f)) & 15
    block = gl.load(ids_ptr + (place >> log2_cells), mask=lane < total, other=0).to(gl.int32)
    return f, place & ((1 << log2_cells) - 1), block


@gluon.jit
def _look_up(
    lane, total, f, cell, block, N, packed_cells, packed_bases, log_counts_ptr, variance_ptr, KEY_VARIANCE: gl.constexpr
):
    """Row of the pyramid (-1 past the last lane), log count and key variance of pooled lanes."""
    real = lane < total
    before = ((packed_bases >> (8 * f)) & 255).to(gl.int32)
    row = before * N + (block << ((packed_cells >> (4 * f)) & 15)) + cell
    log_count = gl.load(log_counts_ptr + row, mask=real, other=float("-inf"))
    spread = log_count
    if KEY_VARIANCE:
        spread = gl.load(variance_ptr + row, mask=real, other=0.0)
    return gl.where(real, row, -1), log_count, spread


@gluon.jit
def _copy_rows(smem, base_ptr, rows, stride, D: gl.constexpr, WIDE: gl.constexpr):
    """Rows of a matrix into shared memory while others work; a row of -1 becomes 0."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.convert_layout(rows, gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    # int64 before it meets a stride where tokens x stride passes 2**31; otherwise half the registers do
    place = (rows.to(gl.int64) if WIDE else rows) * stride
    pointers = base_ptr + (place[:, None] + o_d[None, :])
    _async_load(smem, pointers, mask=(rows >= 0)[:, None])


@gluon.jit
def _send(
    n, k_src, v_src, k_step, v_step, rows, bias, f, k_smem, v_smem, bias_smem, k_full, k_empty, v_full, v_empty, n_v,
    D: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Hand tile n of keys and n_v of values to those who compute."""
    stage = n % STAGES
    mbarrier.wait(k_empty.index(stage), (n // STAGES) & 1 ^ 1)
    _copy_rows(k_smem.index(stage), k_src, rows, k_step, D, WIDE)
    async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
    b_stage = n % (STAGES + 2)
    # in the unit of a product of query and key, as the sum of two numbers in half precision
    CHANNELS: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0])
    high = bias.to(bias_smem.dtype)
    low = gl.where(bias == float("-inf"), 0.0, bias - high.to(gl.float32)).to(bias_smem.dtype)
    high = gl.convert_layout(high, gl.SliceLayout(1, CHANNELS))[:, None]
    low = gl.convert_layout(low, gl.SliceLayout(1, CHANNELS))[:, None]
    channel = gl.arange(0, 16, gl.SliceLayout(0, CHANNELS))[None, :]
    f = gl.convert_layout(f, gl.SliceLayout(1, CHANNELS))[:, None]
    one = gl.where(channel == f + 8, 1.0, 0.0).to(bias_smem.dtype)  # which factor a key belongs to
    bias_smem.index(b_stage).store(gl.where(channel == 0, high, gl.where(channel == 1, low, one)))
    fence_async_shared()
    mbarrier.arrive(k_full.index(stage), count=1)
    stage = n_v % STAGES
    mbarrier.wait(v_empty.index(stage), (n_v // STAGES) & 1 ^ 1)
    _copy_rows(v_smem.index(stage), v_src, rows, v_step, D, WIDE)
    async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)


@gluon.jit
def _mean_square(q_smem, first, rows_ptr, PARTS: gl.constexpr, D: gl.constexpr):
    """Mean of the squared norms over the real queries of the block; a norm that is not finite counts as 0."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_m = gl.arange(0, 32, gl.SliceLayout(1, ROWS))
    total = gl.zeros([32], gl.float32, gl.SliceLayout(1, ROWS))
    number = gl.zeros([32], gl.float32, gl.SliceLayout(1, ROWS))
    for m in gl.static_range(2 * PARTS):
        rows = gl.load(rows_ptr + m * 32 + o_m)
        b_q = q_smem.index(first + m // 2).slice(m % 2 * 32, 32, dim=0).load(ROWS).to(gl.float32)
        norms = gl.sum(b_q * b_q, 1)
        total += gl.where(norms < float("inf"), norms, 0.0)
        number += (rows >= 0).to(gl.float32)
    return gl.sum(total, 0) / gl.sum(number, 0)


@gluon.jit
def _fetch(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, log_counts_ptr, variance_ptr, covariance_ptr,
    block_ids_ptr, offsets_ptr, query_rows_ptr, key_rows_ptr, counter_ptr,
    q_b, q_h, q_step, k_b, k_h, k_step, v_b, v_h, v_step,
    H, M, N, num_rows, work, packed_cells, packed_bases, inverse_scale, norm_scale, bias_cap,
    q_smem, k_smem, v_smem, bias_smem, work_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    F: gl.constexpr, KEY_VARIANCE: gl.constexpr, VALUE_TILT: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """The group of warps that fetches: queries, tiles of keys and values with their biases, covariances."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    PARTS: gl.constexpr = BLOCK_M // 64
    o_l = gl.arange(0, TILE, LANES)
    n_work = 0
    n_k = 0
    n_v = 0
    i = gl.program_id(0)
    begins, lanes = _lists(offsets_ptr + _list_of(i, M) * (F + 1), packed_cells, F)
    row, block = _first_rows(lanes[0], block_ids_ptr + _list_of(i, M) * N, key_rows_ptr, o_l, BLOCK_N, TILE)
    while i < work:
        i_next = gl.atomic_add(counter_ptr, 1) + gl.num_programs(0)
        i_m = M - 1 - i % M
        i_bh = (i // M).to(gl.int64)
        i_b = i_bh // H
        i_h = i_bh % H
        q_head = q_ptr + i_b * q_b + i_h * q_h
        k_head = k_ptr + i_b * k_b + i_h * k_h
        v_head = v_ptr + i_b * v_b + i_h * v_h
        keys_head = keys_ptr + i_bh * num_rows * D
        values_head = values_ptr + i_bh * num_rows * D
        variance_head = variance_ptr + i_bh * num_rows
        ids_ptr = block_ids_ptr + (i_bh * M + i_m) * N

        slot = n_work & 1
        mbarrier.wait(q_empty.index(slot), (n_work >> 1) & 1 ^ 1)
        work_smem.index(slot * (F + 1)).store(gl.full([1], i, gl.int32, LANES))
        for f in gl.static_range(F):
            work_smem.index(slot * (F + 1) + f + 1).store(gl.full([1], lanes[f], gl.int32, LANES))
        for part in gl.static_range(PARTS):
            query_rows = gl.load(query_rows_ptr + i_m * BLOCK_M + part * 64 + gl.arange(0, 64, LANES))
            _copy_rows(q_smem.index(slot * PARTS + part), q_head, query_rows, q_step, D, WIDE)
        async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
        mbarrier.arrive(q_full.index(slot), count=1)

        starts, shifts, pooled = _segments(begins, lanes, TILE, F)
        if F > 1:
            # the first pooled tile is looked up long before it is sent
            f, cell, pooled_block = _find(o_l, pooled, starts, shifts, ids_ptr, packed_cells, F)
            pooled_row, log_count, spread = _look_up(
                o_l, pooled, f, cell, pooled_block, N, packed_cells, packed_bases, log_counts_ptr, variance_head,
                KEY_VARIANCE,
            )  # fmt: skip
            f_next, cell, pooled_block = _find(o_l + TILE, pooled, starts, shifts, ids_ptr, packed_cells, F)

        # addresses run ahead: blocks by two tiles, rows by one
        total = lanes[0]
        for t in range(0, gl.maximum(total, 1), TILE):
            lane = t + TILE + o_l
            next_row = gl.load(key_rows_ptr + block * BLOCK_N + lane % BLOCK_N, mask=lane < total, other=-1)
            block = gl.load(ids_ptr + (lane + TILE) // BLOCK_N, mask=lane + TILE < total, other=0).to(gl.int32)
            bias = gl.where(row >= 0, 0.0, float("-inf"))
            _send(
                n_k, k_head, v_head, k_step, v_step, row, bias, o_l * 0,
                k_smem, v_smem, bias_smem, k_full, k_empty, v_full, v_empty, n_v, D, STAGES, WIDE,
            )  # fmt: skip
            row = next_row
            n_k += 1
            n_v += 1

        if F > 1:
            spread_scale = 0.0
            if KEY_VARIANCE:
                if pooled > 0:
                    mbarrier.wait(q_full.index(slot), (n_work >> 1) & 1)
                    norm = _mean_square(q_smem, slot * PARTS, query_rows_ptr + i_m * BLOCK_M, PARTS, D)
                    spread_scale = norm_scale * norm
            for t in range(0, pooled, TILE):
                lane = t + TILE + o_l
                next_row, next_log_count, next_spread = _look_up(
                    lane, pooled, f_next, cell, pooled_block, N, packed_cells, packed_bases, log_counts_ptr,
                    variance_head, KEY_VARIANCE,
                )  # fmt: skip
                f_after, cell, pooled_block = _find(lane + TILE, pooled, starts, shifts, ids_ptr, packed_cells, F)
                # log(count), not log(factor): a ragged tail averages fewer real tokens, and an empty cell none
                bias = log_count
                if KEY_VARIANCE:
                    spread = gl.where(spread < float("inf"), spread, 0.0)  # false for NaN too
                    bias += gl.minimum(spread_scale * spread, bias_cap)
                bias = bias * inverse_scale
                _send(
                    n_k, keys_head, values_head, D, D, pooled_row, bias, f,
                    k_smem, v_smem, bias_smem, k_full, k_empty, v_full, v_empty, n_v, D, STAGES, WIDE,
                )  # fmt: skip
                pooled_row = next_row
                log_count = next_log_count
                spread = next_spread
                f = f_next
                f_next = f_after
                n_k += 1
                n_v += 1
        # what comes next is looked up before the covariances are sent, which takes a while
        i_there = gl.minimum(i_next, work - 1)
        next_begins, next_lanes = _lists(offsets_ptr + _list_of(i_there, M) * (F + 1), packed_cells, F)
        row, block = _first_rows(
            next_lanes[0], block_ids_ptr + _list_of(i_there, M) * N, key_rows_ptr, o_l, BLOCK_N, TILE
        )
        if VALUE_TILT:
            for f in gl.static_range(1, F):
                if lanes[f] > 0:
                    for c in gl.static_range((D + TILE - 1) // TILE):
                        stage = n_v % STAGES
                        channel = c * TILE + o_l
                        rows = gl.where(channel < D, channel, -1)
                        mbarrier.wait(v_empty.index(stage), (n_v // STAGES) & 1 ^ 1)
                        _copy_rows(v_smem.index(stage), covariance_ptr + (i_bh * F + f) * D * D, rows, D, D, WIDE)
                        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                        n_v += 1
        begins = next_begins
        lanes = next_lanes
        n_work += 1
        i = i_next
    slot = n_work & 1
    mbarrier.wait(q_empty.index(slot), (n_work >> 1) & 1 ^ 1)
    work_smem.index(slot * (F + 1)).store(gl.full([1], -1, gl.int32, LANES))
    async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
    mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def _read(smem, index, LANES: gl.constexpr):
    """One number out of shared memory."""
    return gl.max(smem.index(index).load(LANES), 0)


@gluon.jit
def _fold(x, SUM: gl.constexpr):
    """Sums or maxima over every eighth column: ``[R, C]`` to ``[R, 8]``, within a thread.

    Halves first: column by column, each operation would wait for the one before.
    """
    R: gl.constexpr = x.shape[0]
    LEVELS: gl.constexpr = x.shape[1].bit_length() - 4
    for _level in gl.static_range(LEVELS):
        a, b = x.reshape([R, 2, x.shape[1] // 2]).permute([0, 2, 1]).split()
        x = a + b if SUM else gl.maximum(a, b)
    return x


@gluon.jit
def _pack(x, dtype: gl.constexpr):
    """Weights ``[R, C]`` in half precision, two in a number: ``[R, C / 2]``.

    Halves carried through a loop one by one would be taken apart and put together again in every round.
    """
    a, b = x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
    ASM: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(x, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """What `_pack` packed, as the left side of a product."""
    a = x.to(gl.int16).to(dtype, bitcast=True)
    b = (x >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(a, b).reshape([x.shape[0], x.shape[1] * 2]), LAYOUT)


@gluon.jit
def _softmax(b_s, b_max, qk_scale):
    """Scores to weights relative to the running maximum in base 2: weights, maximum, decay of what came before."""
    largest = gl.convert_layout(gl.max(_fold(b_s, False), 1), gl.SliceLayout(1, b_s.type.layout))
    new_max = gl.maximum(b_max, largest * qk_scale)
    # finite pivot while a row has seen no cell, otherwise -inf - (-inf) = nan
    pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    return gl.exp2(b_s * qk_scale - pivot[:, None]), new_max, gl.exp2(b_max - pivot)


@gluon.jit
def _scores(q_mine, ones, keys, biases, BIAS: gl.constexpr, TILE: gl.constexpr):
    """Start the product of queries and keys. The bias of a key is two more channels, for which a query has ones."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    b_s = gl.zeros([64, TILE], gl.float32, SCORES)
    if BIAS:
        b_s = warpgroup_mma(ones, biases.permute((1, 0)), b_s, use_acc=False, is_async=True)
    return warpgroup_mma(q_mine, keys.permute((1, 0)), b_s, use_acc=BIAS, is_async=True)


@gluon.jit
def _step(
    part, n, n_v, q_mine, ones, k_smem, v_smem, bias_smem, turn, k_full, k_empty, v_full, v_empty,
    b_o, b_p, b_max, b_sum, b_last, b_mass, qk_scale,
    POOLED: gl.constexpr, APART: gl.constexpr, TURNS: gl.constexpr,
    D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of tile n, while the values of the tile before are added.

    Two groups that compute take turns: products of one run while the other makes weights. Every product ends within the
    step: one that crosses the end of a loop makes the assembler wait after each.

    Tokens are all of one factor: their weights are added up as they are made, `b_last` those of the last tile, `b_sum`
    those of the tiles before. Pooled tiles may hold several factors: which key belongs to which is a matrix of ones
    next to the biases, so that the masses of the factors are a product like the values. It runs beside that of the
    values, one tile late, or with APART by itself, where the assembler finds too few registers for both.
    """
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    FEW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    MASSES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    stage = n % STAGES
    v_stage = (n_v - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
    fence_async_shared()
    if TURNS:
        mbarrier.wait(turn.index(part), (n & 1) ^ (1 - part))
    b_s = _scores(q_mine, ones, k_smem.index(stage), bias_smem.index(n % (STAGES + 2)), POOLED, TILE)
    mbarrier.wait(v_full.index(v_stage), ((n_v - 1) // STAGES) & 1)
    fence_async_shared()
    b_w = _unpack(b_p, q_mine.dtype, gl.DotOperandLayout(0, OUT, 2))
    b_o = warpgroup_mma(b_w, v_smem.index(v_stage), b_o, is_async=True)
    BESIDE: gl.constexpr = POOLED and not APART
    if BESIDE:
        b_mass = warpgroup_mma(b_w, bias_smem.index((n - 1) % (STAGES + 2)), b_mass, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index(1 - part), count=1)
    b_s = warpgroup_mma_wait(2 if BESIDE else 1, deps=(b_s,))
    # early where a third tile of keys waits for this one's place
    if STAGES == 2:
        mbarrier.arrive(k_empty.index(stage), count=1)
    b_s, new_max, decay = _softmax(b_s, b_max, qk_scale)
    few = gl.convert_layout(decay, gl.SliceLayout(1, FEW))[:, None]
    if POOLED:
        b_sum = b_sum * few
        b_last = b_last * few
    else:
        b_sum = (b_sum + b_last) * few
        b_last = gl.convert_layout(_fold(b_s, True), FEW)
    if BESIDE:
        b_o, b_mass, b_w = warpgroup_mma_wait(0, deps=(b_o, b_mass, b_w))
    else:
        b_o, b_w = warpgroup_mma_wait(0, deps=(b_o, b_w))
    # not before: the assembler serialises products whose operands are made while others run
    b_next = _pack(b_s, q_mine.dtype)
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    if STAGES > 2:
        mbarrier.arrive(k_empty.index(stage), count=1)
    b_o = b_o * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
    if POOLED:
        b_mass = b_mass * gl.convert_layout(decay, gl.SliceLayout(1, MASSES))[:, None]
        if APART:
            b_w = _unpack(b_next, q_mine.dtype, gl.DotOperandLayout(0, MASSES, 2))
            b_mass = warpgroup_mma(b_w, bias_smem.index(n % (STAGES + 2)), b_mass, is_async=True)
            b_mass = warpgroup_mma_wait(0, deps=(b_mass,))
    return b_o, b_next, new_max, b_sum, b_last, b_mass


@gluon.jit
def _compute(
    part, o_ptr, sizes_ptr, query_rows_ptr, o_b, o_h, o_step, H, M, packed_cells, ragged, scale, qk_scale,
    q_smem, ones, k_smem, v_smem, bias_smem, work_smem, turn, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    F: gl.constexpr, VALUE_TILT: gl.constexpr, SIZED: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """A group of warps that computes: 64 queries of a block against all that is fetched."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    FEW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    dtype: gl.constexpr = q_smem.dtype
    TURNS: gl.constexpr = BLOCK_M == 128
    MASSES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    o_c = gl.arange(0, 16, gl.SliceLayout(0, MASSES))
    n_work = 0
    n_k = 0
    n_v = 0
    mbarrier.wait(q_full.index(0), 0)
    i = _read(work_smem, 0, LANES)
    while i >= 0:
        i_m = M - 1 - i % M
        i_bh = (i // M).to(gl.int64)
        slot = n_work & 1
        q_mine = q_smem.index(slot * (BLOCK_M // 64) + part)
        lanes = ()
        kept = 0
        for f in gl.static_range(F):
            lanes = lanes + (_read(work_smem, slot * (F + 1) + f + 1, LANES),)
            kept += lanes[f]
        query_rows = gl.load(query_rows_ptr + i_m * BLOCK_M + part * 64 + gl.arange(0, 64, gl.SliceLayout(1, ROWS)))
        # all keys of the first tiles are real
        clean = gl.maximum(lanes[0] - ragged, 0) // TILE
        tiles = gl.maximum((lanes[0] + TILE - 1) // TILE, 1) + (kept - lanes[0] + TILE - 1) // TILE

        mbarrier.wait(k_full.index(n_k % STAGES), (n_k // STAGES) & 1)
        fence_async_shared()
        stage = n_k % STAGES
        if TURNS:
            mbarrier.wait(turn.index(part), (n_k & 1) ^ (1 - part))
        b_s = _scores(q_mine, ones, k_smem.index(stage), bias_smem.index(n_k % (STAGES + 2)), True, TILE)
        if TURNS:
            mbarrier.arrive(turn.index(1 - part), count=1)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        b_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        b_s, b_max, _decay = _softmax(b_s, b_max, qk_scale)
        b_last = gl.convert_layout(_fold(b_s, True), FEW)
        b_sum = gl.zeros([64, 8], gl.float32, FEW)
        b_mass = gl.zeros([64, 16], gl.float32, MASSES)
        b_p = _pack(b_s, dtype)
        b_o = gl.zeros([64, D], gl.float32, OUT)
        for t in range(1, clean):
            b_o, b_p, b_max, b_sum, b_last, b_mass = _step(
                part, n_k + t, n_v + t, q_mine, ones, k_smem, v_smem, bias_smem, turn, k_full, k_empty, v_full, v_empty,
                b_o, b_p, b_max, b_sum, b_last, b_mass, qk_scale, False, APART, TURNS, D, TILE, STAGES,
            )  # fmt: skip
        for t in range(gl.maximum(clean, 1), tiles):
            b_o, b_p, b_max, b_sum, b_last, b_mass = _step(
                part, n_k + t, n_v + t, q_mine, ones, k_smem, v_smem, bias_smem, turn, k_full, k_empty, v_full, v_empty,
                b_o, b_p, b_max, b_sum, b_last, b_mass, qk_scale, True, APART, TURNS, D, TILE, STAGES,
            )  # fmt: skip
        n_k += tiles
        n_v += tiles
        stage = (n_v - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((n_v - 1) // STAGES) & 1)
        fence_async_shared()
        b_w = _unpack(b_p, dtype, gl.DotOperandLayout(0, OUT, 2))
        b_o = warpgroup_mma(b_w, v_smem.index(stage), b_o, is_async=True)
        if not APART:
            b_mass = warpgroup_mma(b_w, bias_smem.index((n_k - 1) % (STAGES + 2)), b_mass, is_async=True)
        b_o, b_mass, b_w = warpgroup_mma_wait(0, deps=(b_o, b_mass, b_w))
        mbarrier.arrive(v_empty.index(stage), count=1)
        # a row that keeps nothing is 0; 0 / 0 of a row whose weights all vanish stays NaN, as in dense attention
        if APART:
            b_sum += b_last
        sum_tokens = gl.convert_layout(gl.sum(b_sum, 1), gl.SliceLayout(1, MASSES))
        sum_mass = sum_tokens + gl.sum(gl.where(o_c[None, :] >= 8, b_mass, 0.0), 1)
        sum_mass = gl.where(kept > 0, sum_mass, 1.0)
        b_o = b_o / gl.convert_layout(sum_mass, gl.SliceLayout(1, OUT))[:, None]

        if VALUE_TILT:
            zero = gl.zeros([64, D], gl.float32, OUT)
            CHUNK: gl.constexpr = min(D, TILE)
            for f in gl.static_range(1, F):
                if lanes[f] > 0:
                    share = gl.sum(gl.where(o_c[None, :] == f + 8, b_mass, 0.0), 1) / sum_mass * scale
                    if SIZED:
                        share = share * gl.load(sizes_ptr + i_bh * F + f)
                    share = gl.convert_layout(share, gl.SliceLayout(1, OUT))
                    for c in gl.static_range(D // CHUNK):
                        stage = n_v % STAGES
                        mbarrier.wait(v_full.index(stage), (n_v // STAGES) & 1)
                        fence_async_shared()
                        queries = q_mine.slice(c * CHUNK, CHUNK, dim=1)
                        covariance = v_smem.index(stage).slice(0, CHUNK, dim=0)
                        b_t = warpgroup_mma(queries, covariance, zero, use_acc=False, is_async=True)
                        b_t = warpgroup_mma_wait(0, deps=(b_t,))
                        mbarrier.arrive(v_empty.index(stage), count=1)
                        b_o += b_t * share[:, None]
                        n_v += 1
        o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
        q_mine.store(b_o.to(dtype))
        pointers = (
            o_ptr + (i_bh // H) * o_b + (i_bh % H) * o_h + query_rows.to(gl.int64)[:, None] * o_step + o_d[None, :]
        )
        gl.store(pointers, q_mine.load(ROWS), mask=(query_rows >= 0)[:, None])
        mbarrier.arrive(q_empty.index(slot), count=1)

        n_work += 1
        slot = n_work & 1
        mbarrier.wait(q_full.index(slot), (n_work >> 1) & 1)
        i = _read(work_smem, slot * (F + 1), LANES)


@gluon.jit(do_not_specialize=["H", "M", "N", "num_rows", "work", "packed_cells", "packed_bases", "ragged"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,                         # [B, H, L, D]
    keys_ptr, values_ptr, log_counts_ptr,               # [B, H, P, D] [B, H, P, D] [P]
    variance_ptr, covariance_ptr, sizes_ptr,            # [B, H, P] [B, H, F, D, D] [B, H, F]; see `_halve`
    block_ids_ptr, offsets_ptr,                         # [B, H, M, N] [B, H, M, F + 1]
    query_rows_ptr, key_rows_ptr,                       # [M * BLOCK_M] [N * BLOCK_N], -1 = no token
    counter_ptr,                                        # [1], 0: query blocks given to programs beyond their first
    q_b, q_h, q_step, k_b, k_h, k_step, v_b, v_h, v_step, o_b, o_h, o_step,
    H, M, N, num_rows, work, packed_cells, packed_bases,
    ragged,                                             # lanes at the end of factor 1 that may hold no token
    scale, qk_scale, inverse_scale, norm_scale, bias_cap,  # softmax scale s, s log2(e), 1/s, s^2/2, cap of the bias
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    F: gl.constexpr, KEY_VARIANCE: gl.constexpr, VALUE_TILT: gl.constexpr, SIZED: gl.constexpr, WIDE: gl.constexpr,
    APART: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: one program a multiprocessor. Each takes query blocks from a counter until there are none."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    PARTS: gl.constexpr = BLOCK_M // 64
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [2 * PARTS, 64, D], SWIZZLED)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], SWIZZLED)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], SWIZZLED)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    # two more than of keys: the bias of a tile is read once more when its values are added
    bias_smem = gl.allocate_shared_memory(dtype, [STAGES + 2, TILE, 16], NARROW)
    ones = gl.allocate_shared_memory(dtype, [64, 16], NARROW)
    ONES: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    channel = gl.arange(0, 16, gl.SliceLayout(0, ONES))[None, :]
    ones.store(gl.where((channel < 2) & (gl.arange(0, 64, gl.SliceLayout(1, ONES))[:, None] >= 0), 1.0, 0.0).to(dtype))
    work_smem = gl.allocate_shared_memory(gl.int32, [2 * (F + 1), 1], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
        mbarrier.init(q_full.index(i), count=129)  # a copy of each thread, and one for what is stored
        mbarrier.init(q_empty.index(i), count=PARTS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=129)
        mbarrier.init(k_empty.index(i), count=PARTS)
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(v_empty.index(i), count=PARTS)
    fence_async_shared()
    # constants keep their kind only where they stand in the call, so the lists are written out
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_compute, (
                    0, o_ptr, sizes_ptr, query_rows_ptr, o_b, o_h, o_step, H, M, packed_cells, ragged, scale, qk_scale,
                    q_smem, ones, k_smem, v_smem, bias_smem, work_smem, turn,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    D, BLOCK_M, BLOCK_N, TILE, STAGES, F, VALUE_TILT, SIZED, APART,
                )),
                (_compute, (
                    1, o_ptr, sizes_ptr, query_rows_ptr, o_b, o_h, o_step, H, M, packed_cells, ragged, scale, qk_scale,
                    q_smem, ones, k_smem, v_smem, bias_smem, work_smem, turn,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    D, BLOCK_M, BLOCK_N, TILE, STAGES, F, VALUE_TILT, SIZED, APART,
                )),
                (_fetch, (
                    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, log_counts_ptr, variance_ptr, covariance_ptr,
                    block_ids_ptr, offsets_ptr, query_rows_ptr, key_rows_ptr, counter_ptr,
                    q_b, q_h, q_step, k_b, k_h, k_step, v_b, v_h, v_step,
                    H, M, N, num_rows, work, packed_cells, packed_bases, inverse_scale, norm_scale, bias_cap,
                    q_smem, k_smem, v_smem, bias_smem, work_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    D, BLOCK_M, BLOCK_N, TILE, STAGES, F, KEY_VARIANCE, VALUE_TILT, WIDE,
                )),
            ],
            [4, 4],
            [COMPUTE_REGISTERS, FETCH_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (
                    0, o_ptr, sizes_ptr, query_rows_ptr, o_b, o_h, o_step, H, M, packed_cells, ragged, scale, qk_scale,
                    q_smem, ones, k_smem, v_smem, bias_smem, work_smem, turn,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    D, BLOCK_M, BLOCK_N, TILE, STAGES, F, VALUE_TILT, SIZED, APART,
                )),
                (_fetch, (
                    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, log_counts_ptr, variance_ptr, covariance_ptr,
                    block_ids_ptr, offsets_ptr, query_rows_ptr, key_rows_ptr, counter_ptr,
                    q_b, q_h, q_step, k_b, k_h, k_step, v_b, v_h, v_step,
                    H, M, N, num_rows, work, packed_cells, packed_bases, inverse_scale, norm_scale, bias_cap,
                    q_smem, k_smem, v_smem, bias_smem, work_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    D, BLOCK_M, BLOCK_N, TILE, STAGES, F, KEY_VARIANCE, VALUE_TILT, WIDE,
                )),
            ],
            [4],
            [FETCH_REGISTERS],
        )  # fmt: skip
