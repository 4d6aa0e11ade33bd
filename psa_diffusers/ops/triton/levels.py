"""Stage 5: at which factor each block of queries reads each block of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.triton.launch import head_strides, load_rows, next_power_of_2, on_device, padded
from psa_diffusers.ops.triton.tuning import row_warps, tile_warps
from psa_diffusers.ops.types import Factors, LevelRule, Levels, Thresholds

MAX_BLOCKS = 2**14  # a row of blocks is ranked within one program


def assign_block_levels(
    importance: Tensor, layout: Layout, rule: LevelRule, *, cap: Tensor | None = None, finite: Tensor | None = None
) -> Tensor:
    """Rank the video blocks of every row, and read all that touches text at factor 1. As in `ops.reference`."""
    check_row(importance.shape[3], layout.block_n)
    level_map = torch.empty(importance.shape, dtype=torch.int16, device=importance.device)
    if rule.mode == "topk":
        select_levels(importance, layout, rule.levels, cap, finite, level_map)
    else:
        _sort_levels(importance, layout, rule, cap, finite, level_map)
    return level_map


def select_levels(
    importance: Tensor, layout: Layout, levels: Levels, cap: Tensor | None, finite: Tensor | None,
    out: Tensor, offsets: Tensor | None = None, factors: Factors = (),
) -> None:  # fmt: skip
    """Fill ``out`` by rank: with a level map, or where ``offsets`` are given with the block ids of a schedule.

    Args:
        importance: As `layout`, `cap` and `finite`: what `assign_block_levels` takes.
        layout: The same.
        levels: Those of its rule.
        cap: The same.
        finite: The same.
        out: ``[B, H, M, N]`` int16 level map, or ``block_ids`` of a schedule.
        offsets: ``[B, H, M, F + 1]`` int32 of that schedule.
        factors: Its factors.
    """
    batch, heads, num_q, num_k = importance.shape
    ranked = layout.video_key_blocks
    size = max(16, next_power_of_2(num_k))
    unused = importance
    with on_device(importance):
        _select_kernel[(num_q, batch * heads)](
            importance.contiguous(), unused if cap is None else cap, unused if finite is None else finite,
            out, unused if offsets is None else offsets,
            tuple(float(round(bound * ranked)) for _, bound in levels[:-1]),
            num_k, layout.video_query_blocks, ranked,
            LEVELS=tuple(factor for factor, _ in levels), FACTORS=tuple(factors), TO_MAP=offsets is None,
            HAS_CAP=cap is not None, HAS_FINITE=finite is not None, SIZE=size, AT_ONCE=counted_at_once(num_k),
            num_warps=row_warps(size, 512), enable_fp_fusion=True,
        )  # fmt: skip


def _sort_levels(importance, layout, rule, cap, finite, level_map) -> None:
    """Fill a level map by cumulative importance, as `assign_block_levels`."""
    batch, heads, num_q, num_k = importance.shape
    ranked = layout.video_key_blocks
    size = max(16, next_power_of_2(num_k))
    with on_device(importance):
        _sort_kernel[(num_q, batch * heads)](
            importance.contiguous(), level_map if cap is None else cap, level_map if finite is None else finite,
            level_map, tuple(float(bound) for _, bound in rule.levels[:-1]),
            num_k, layout.video_query_blocks, ranked, max(1, -int(-rule.min_full_ratio * ranked // 1)),
            LEVELS=tuple(factor for factor, _ in rule.levels),
            HAS_CAP=cap is not None, HAS_FINITE=finite is not None, SIZE=size,
            num_warps=row_warps(size, 512), enable_fp_fusion=True,
        )  # fmt: skip


def check_row(num_blocks: int, block_n: int) -> None:
    """Refuse rows that do not fit into one program."""
    if num_blocks > MAX_BLOCKS:
        raise ValueError(
            f"the Triton kernels rank at most {MAX_BLOCKS} key blocks a row, got {num_blocks} of {block_n} tokens: "
            "use a larger block_size.n, or backend='torch'"
        )


def key_cosine_cap(k: Tensor, layout: Layout, thresholds: Thresholds) -> Tensor:
    """The largest factor at which the keys of a block are still alike. As in `ops.reference`."""
    batch, heads, _, dim = k.shape
    block_n = layout.block_n
    pairs = sorted((factor, threshold) for factor, threshold in thresholds if factor <= block_n)
    cap = torch.ones(batch, heads, layout.num_key_blocks, dtype=torch.int16, device=k.device)
    if not pairs:
        return cap
    with on_device(k):
        _cosine_cap_kernel[(layout.num_key_blocks, batch * heads)](
            k, layout.key_rows, cap, head_strides(k), heads, layout.num_key_blocks,
            tuple(float(threshold) for _, threshold in pairs),
            FACTORS=tuple(factor for factor, _ in pairs), HEAD_DIM=dim, D_PAD=padded(dim), BLOCK_N=block_n,
            num_warps=tile_warps(block_n * padded(dim)), enable_fp_fusion=True,
        )  # fmt: skip
    return cap


@triton.jit(do_not_specialize=["num_blocks", "video_rows", "num_ranked"])
def _select_kernel(
    importance_ptr, cap_ptr, finite_ptr,        # [B, H, M, N] [B, H, N] [B, H]
    out_ptr, offsets_ptr,                       # [B, H, M, N] level map or block ids; [B, H, M, F + 1], not with TO_MAP
    BOUNDS, num_blocks, video_rows, num_ranked,  # ranks at which a level ends
    LEVELS: tl.constexpr, FACTORS: tl.constexpr,  # factors, finest first; ascending and without 0
    TO_MAP: tl.constexpr, HAS_CAP: tl.constexpr, HAS_FINITE: tl.constexpr, SIZE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One row of blocks: which are above each bound, then the map or the lists. Grid: (M, B * H)."""
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    row = i_bh * tl.num_programs(0) + i_m
    o_n = tl.arange(0, SIZE)
    is_ranked = o_n < num_ranked
    importance = tl.load(importance_ptr + row * num_blocks + o_n, mask=is_ranked, other=0.0)
    all_full = _reads_all(importance, finite_ptr, i_bh, i_m, video_rows, HAS_FINITE)
    key = tl.where(is_ranked, _ordered(tl.where(all_full, 0.0, importance)), -0x80000000)
    highest = tl.max(key, 0)
    lowest = tl.min(tl.where(is_ranked, key, highest), 0)
    factor = tl.full([SIZE], LEVELS[0], tl.int32)
    # a later bound lies below: the search for it begins where the last one ended
    end = highest + 1
    above = 0
    for level in range(1, len(LEVELS)):  # not unrolled: the code of all would not fit where instructions are kept
        bound, coarser = 0.0, 0
        for i in tl.static_range(1, len(LEVELS)):
            bound = tl.where(level == i, BOUNDS[i - 1], bound)
            coarser = tl.where(level == i, LEVELS[i], coarser)
        inside, end, above = _largest(key, o_n, bound.to(tl.int32), lowest, num_ranked, end, above)
        factor = tl.where(inside, factor, coarser)
    # the first block is read in full, whatever the levels say
    factor = tl.where(o_n == tl.min(tl.where(key == highest, o_n, SIZE), 0), 1, factor)
    if HAS_CAP:
        cap = tl.load(cap_ptr + i_bh * num_blocks + o_n, mask=is_ranked, other=1)
        factor = tl.minimum(factor, cap.to(tl.int32))
    # text columns, and all of a text row
    factor = tl.where(all_full | (o_n >= num_ranked), 1, factor)
    out_ptr += row * num_blocks
    if TO_MAP:
        tl.store(out_ptr + o_n, factor.to(tl.int16), mask=o_n < num_blocks)
    else:
        write_lists(tl.where(o_n < num_blocks, factor, 0), out_ptr, offsets_ptr, row, FACTORS, AT_ONCE)


@triton.jit
def _largest(key, o_n, count, lowest, total, end, above):
    """Which of ``key`` are the ``count`` largest, of equal ones the first; ``total`` of them are ``lowest`` or more.

    Halves the range of the threshold until it parts as many as are wanted, which random numbers need a dozen rounds
    for, or until it is a single number, which ties need. ``above`` keys, at most ``count``, are ``end`` or more. The
    same two numbers for the next search, which must not ask for fewer, are returned as well.
    """
    high = end
    low = tl.where(count > above, lowest, high)
    reached = tl.where(count > above, total, above)  # keys from low on, at least count
    middle = (low & high) + ((low ^ high) >> 1)  # the sum of both may pass 2**31
    while (reached != count) & (middle != low):
        number = tl.sum((key >= middle).to(tl.int32), 0)
        enough = number >= count
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, number, reached)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, number)
        middle = (low & high) + ((low ^ high) >> 1)
    inside = key >= low
    if reached != count:
        # the first of those that are equal: up to which index, is found by halving, too
        tied = key == low
        first = 0
        last = key.shape[0]
        while last - first > 1:
            between = (first + last) // 2
            enough = tl.sum((tied & (o_n < between)).to(tl.int32), 0) >= count - above
            first = tl.where(enough, first, between)
            last = tl.where(enough, between, last)
        inside = inside & ((key > low) | (o_n < last))
    is_exact = reached == count
    return inside, tl.where(is_exact, low, high), tl.where(is_exact, count, above)


def counted_at_once(num_blocks: int) -> int:
    """Factors whose blocks are counted together in one integer, for rows of so many blocks."""
    return 3 if num_blocks < 1024 else 2


@triton.jit
def write_lists(level, block_ids_ptr, offsets_ptr, row, FACTORS: tl.constexpr, AT_ONCE: tl.constexpr):
    """The blocks of one row grouped by factor, ``level [SIZE]`` with 0 past the row's end: a counting sort.

    AT_ONCE factors are counted at once, each in BITS of a number.
    """
    BITS: tl.constexpr = 10 if AT_ONCE == 3 else 16
    SIZE: tl.constexpr = level.shape[0]
    offsets_ptr += row * (len(FACTORS) + 1)
    tl.store(offsets_ptr, 0)
    place = tl.full([SIZE], -1, tl.int32)
    start = 0
    for f in tl.static_range(0, len(FACTORS), AT_ONCE):
        one = tl.zeros([SIZE], tl.int32)
        for i in tl.static_range(AT_ONCE):
            if f + i < len(FACTORS):
                one = tl.where(level == FACTORS[f + i], 1 << (BITS * i), one)
        running = tl.cumsum(one, 0)
        numbers = tl.sum(one, 0)
        for i in tl.static_range(AT_ONCE):
            if f + i < len(FACTORS):
                rank = (running >> (BITS * i)) & ((1 << BITS) - 1)
                place = tl.where(level == FACTORS[f + i], start + rank - 1, place)
                start += (numbers >> (BITS * i)) & ((1 << BITS) - 1)
                tl.store(offsets_ptr + f + i + 1, start)
    tl.store(block_ids_ptr + place, tl.arange(0, SIZE).to(block_ids_ptr.dtype.element_ty), mask=place >= 0)


@triton.jit
def _reads_all(importance, finite_ptr, i_bh, i_m, video_rows, HAS_FINITE: tl.constexpr):
    """Whether a row reads everything at factor 1: a text row, or one with a number that is not finite."""
    all_full = (i_m >= video_rows) | (tl.min((tl.abs(importance) < float("inf")).to(tl.int32), 0) == 0)
    if HAS_FINITE:
        all_full = all_full | (tl.load(finite_ptr + i_bh).to(tl.int32) == 0)
    return all_full


@triton.jit
def _ordered(x):
    """Floats as integers of the same order; -0 becomes 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["num_blocks", "video_rows", "num_ranked", "full"])
def _sort_kernel(
    importance_ptr, cap_ptr, finite_ptr, level_map_ptr,  # [B, H, M, N] [B, H, N] [B, H] [B, H, M, N]
    BOUNDS, num_blocks, video_rows, num_ranked, full,    # cumulative shares at which a level ends
    LEVELS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_FINITE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One row of blocks, sorted on the chip. Grid: (M, B * H)."""
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    row = (i_bh * tl.num_programs(0) + i_m) * num_blocks
    o_n = tl.arange(0, SIZE)
    # text columns, and all of a text row
    tl.store(level_map_ptr + row + o_n, tl.full([SIZE], 1, tl.int16), mask=(o_n < num_blocks) & (o_n >= num_ranked))
    importance = tl.load(importance_ptr + row + o_n, mask=o_n < num_ranked, other=0.0)
    all_full = _reads_all(importance, finite_ptr, i_bh, i_m, video_rows, HAS_FINITE)

    # largest first, and below them the index, which breaks ties
    entry = ((-1 - _ordered(importance).to(tl.int64)) << 32) | o_n.to(tl.int64)
    entry = tl.where(o_n < num_ranked, entry, 0x7FFFFFFFFFFFFFFF)
    entry = tl.sort(entry)
    column = (entry & 0xFFFFFFFF).to(tl.int32)
    ordered = (-1 - (entry >> 32)).to(tl.int32)
    share = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    share = tl.where(o_n < num_ranked, share, 0.0)
    # mass before the block, so that the block which crosses a bound is on the finer side; an exact
    # division, or a row whose mass meets a bound would depend on the chip
    position = tl.div_rn(tl.cumsum(share, 0) - share, tl.maximum(tl.sum(importance, 0), 1.1754943508222875e-38))
    factor = tl.full([SIZE], LEVELS[0], tl.int32)
    for level in tl.static_range(1, len(LEVELS)):
        factor = tl.where(position >= BOUNDS[level - 1], LEVELS[level], factor)
    factor = tl.where(o_n < full, 1, factor)
    if HAS_CAP:
        cap = tl.load(cap_ptr + i_bh * num_blocks + column, mask=o_n < num_ranked, other=1)
        factor = tl.minimum(factor, cap.to(tl.int32))
    factor = tl.where(all_full, 1, factor)
    tl.store(level_map_ptr + row + column, factor.to(tl.int16), mask=o_n < num_ranked)


@triton.jit(do_not_specialize=["num_blocks"])
def _cosine_cap_kernel(
    k_ptr, rows_ptr, cap_ptr,        # [B, H, L, D] [N * BLOCK_N] [B, H, N]
    K_STRIDES, H, num_blocks, THRESHOLDS,
    FACTORS: tl.constexpr, HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One key block. Grid: (N, B * H)."""
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    k_head = k_ptr + (i_bh // H) * K_STRIDES[0] + (i_bh % H) * K_STRIDES[1]
    cap = 1
    for i in tl.static_range(len(FACTORS)):
        mean = _mean_cosine(
            k_head, rows_ptr + i_n * BLOCK_N, K_STRIDES[2], FACTORS[i], HEAD_DIM, D_PAD, BLOCK_N // FACTORS[i]
        )
        cap = tl.where(mean > THRESHOLDS[i], FACTORS[i], cap)
    tl.store(cap_ptr + i_bh * num_blocks + i_n, cap.to(tl.int16))


@triton.jit
def _mean_cosine(
    k_ptr, rows_ptr, stride, FACTOR: tl.constexpr, HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, CELLS: tl.constexpr
):
    """Mean cosine of the first and last key of the full cells, -inf if there is none."""
    o_d = tl.arange(0, D_PAD)
    o_c = tl.arange(0, CELLS)
    # real tokens stand at the front, so a cell with a last token is full
    last_rows = tl.load(rows_ptr + o_c * FACTOR + FACTOR - 1)
    first_rows = tl.where(last_rows >= 0, tl.load(rows_ptr + o_c * FACTOR), -1)
    first = load_rows(k_ptr, first_rows, first_rows >= 0, stride, o_d, HEAD_DIM, D_PAD).to(tl.float32)
    last = load_rows(k_ptr, last_rows, last_rows >= 0, stride, o_d, HEAD_DIM, D_PAD).to(tl.float32)
    norm_first = tl.maximum(tl.sqrt(tl.sum(first * first, 1)), 1e-8)
    norm_last = tl.maximum(tl.sqrt(tl.sum(last * last, 1)), 1e-8)
    cosine = tl.sum(first / norm_first[:, None] * (last / norm_last[:, None]), 1)
    number = tl.sum((last_rows >= 0).to(tl.float32), 0)
    return tl.where(number > 0, tl.sum(cosine, 0) / tl.maximum(number, 1.0), float("-inf"))
