"""Stage 5: at which factor each block of queries reads each block of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.kernels.launch import head_strides, load_rows, on_device, padded
from psa_diffusers.kernels.tuning import row_warps, tile_warps
from psa_diffusers.layout import Layout

MAX_BLOCKS = 2**14  # a row of blocks is ranked within one program


def assign_block_levels(
    importance: Tensor,
    layout: Layout,
    levels: tuple[tuple[int, float], ...],
    mode: str,
    *,
    min_full_ratio: float = 0.06,
    cap: Tensor | None = None,
    finite: Tensor | None = None,
) -> Tensor:
    """Rank the video blocks of every row, and read all that touches text at factor 1. As `psa_diffusers.stages.levels`.

    Args:
        importance: ``[B, H, M, N]`` float32, larger is more important.
        layout: Where video and text blocks stand.
        levels: ``(factor, upper bound)`` of the intervals, finest first; factor 0 skips.
        mode: ``topk`` or ``thresholdbound``.
        min_full_ratio: For ``thresholdbound``: at least this share of the blocks is at factor 1.
        cap: ``[B, H, N]`` largest factor that each key block bears.
        finite: ``[B, H]`` bool; a head that is not finite reads everything at factor 1.

    Returns:
        Level map ``[B, H, M, N]`` int16: the factor, or 0 = skip.
    """
    batch, heads, num_q, num_k = importance.shape
    ranked = layout.video_key_blocks
    check_row(num_k, layout.block_n)
    if mode == "topk":
        full = 1
        bounds = tuple(float(round(bound * ranked)) for _, bound in levels[:-1])
    else:
        full = max(1, -int(-min_full_ratio * ranked // 1))
        bounds = tuple(float(bound) for _, bound in levels[:-1])
    unused = level_map = torch.empty(importance.shape, dtype=torch.int16, device=importance.device)
    size = max(16, triton.next_power_of_2(num_k))
    with on_device(importance):
        _levels_kernel[(num_q, batch * heads)](
            importance.contiguous(), unused if cap is None else cap, unused if finite is None else finite, level_map,
            bounds, num_k, layout.video_query_blocks, ranked, full,
            FACTORS=tuple(factor for factor, _ in levels), TOPK=mode == "topk",
            HAS_CAP=cap is not None, HAS_FINITE=finite is not None, SIZE=size,
            num_warps=row_warps(size), enable_fp_fusion=True,
        )  # fmt: skip
    return level_map


def check_row(num_blocks: int, block_n: int) -> None:
    """Refuse rows that do not fit into one program."""
    if num_blocks > MAX_BLOCKS:
        raise ValueError(
            f"the Triton kernels rank at most {MAX_BLOCKS} key blocks a row, got {num_blocks} of {block_n} tokens: "
            "use a larger block_size.n, or backend='torch'"
        )


def key_cosine_cap(k: Tensor, layout: Layout, thresholds: tuple[tuple[int, float], ...]) -> Tensor:
    """The largest factor at which the keys of a block are still alike. See `psa_diffusers.stages.levels`.

    Args:
        k: Keys ``[B, H, L, D]``; any strides with contiguous channels.
        layout: Where tokens stand.
        thresholds: ``(factor, threshold)`` pairs, factors above 1.

    Returns:
        ``[B, H, N]`` int16.
    """
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


@triton.jit(do_not_specialize=["num_blocks", "video_rows", "num_ranked", "full"])
def _levels_kernel(
    importance_ptr, cap_ptr, finite_ptr, level_map_ptr,  # [B, H, M, N] [B, H, N] [B, H] [B, H, M, N]
    BOUNDS, num_blocks, video_rows, num_ranked, full,    # ranks (topk) or cumulative shares at which a level ends
    FACTORS: tl.constexpr, TOPK: tl.constexpr, HAS_CAP: tl.constexpr, HAS_FINITE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One row of blocks, sorted on the chip. Grid: (M, B * H)."""
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    row = (i_bh * tl.num_programs(0) + i_m) * num_blocks
    o_n = tl.arange(0, SIZE)
    # text columns, and all of a text row
    tl.store(level_map_ptr + row + o_n, tl.full([SIZE], 1, tl.int16), mask=(o_n < num_blocks) & (o_n >= num_ranked))
    importance = tl.load(importance_ptr + row + o_n, mask=o_n < num_ranked, other=0.0)
    all_full = (i_m >= video_rows) | (tl.min((tl.abs(importance) < float("inf")).to(tl.int32), 0) == 0)
    if HAS_FINITE:
        all_full = all_full | (tl.load(finite_ptr + i_bh).to(tl.int32) == 0)

    # floats as integers of the same order, largest first, and below them the index, which breaks ties; -0 becomes 0
    bits = (importance + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    entry = ((-1 - ordered.to(tl.int64)) << 32) | o_n.to(tl.int64)
    entry = tl.where(o_n < num_ranked, entry, 0x7FFFFFFFFFFFFFFF)
    entry = tl.sort(entry)
    column = (entry & 0xFFFFFFFF).to(tl.int32)
    if TOPK:
        position = o_n.to(tl.float32)
    else:
        ordered = (-1 - (entry >> 32)).to(tl.int32)
        share = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
        share = tl.where(o_n < num_ranked, share, 0.0)
        # mass before the block, so that the block which crosses a bound is on the finer side; an exact
        # division, or a row whose mass meets a bound would depend on the chip
        position = tl.div_rn(tl.cumsum(share, 0) - share, tl.maximum(tl.sum(importance, 0), 1.1754943508222875e-38))
    factor = tl.full([SIZE], FACTORS[0], tl.int32)
    for level in tl.static_range(1, len(FACTORS)):
        factor = tl.where(position >= BOUNDS[level - 1], FACTORS[level], factor)
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
