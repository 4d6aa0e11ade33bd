"""Stage 6: the level map as lists of key blocks, grouped by factor, that an attention loop can walk."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.triton.launch import next_power_of_2, on_device
from psa_diffusers.ops.triton.levels import assign_block_levels, check_row, counted_at_once, select_levels, write_lists
from psa_diffusers.ops.triton.tuning import row_warps
from psa_diffusers.ops.types import Factors, LevelRule, Schedule, id_dtype


def make_schedule(level_map: Tensor, factors: Factors, block_n: int) -> Schedule:
    """Group the kept blocks of every row by factor. As in `ops.reference`."""
    batch, heads, num_q, num_k = level_map.shape
    schedule = _empty(level_map, factors, block_n)
    size = max(16, next_power_of_2(num_k))
    with on_device(level_map):
        _schedule_kernel[(num_q, batch * heads)](
            level_map.contiguous(), schedule.block_ids, schedule.offsets, num_k, FACTORS=tuple(factors), SIZE=size,
            AT_ONCE=counted_at_once(num_k), num_warps=row_warps(size, 512), enable_fp_fusion=True,
        )  # fmt: skip
    return schedule


def plan_blocks(
    importance: Tensor, layout: Layout, rule: LevelRule, factors: Factors, *,
    cap: Tensor | None = None, finite: Tensor | None = None,
) -> Schedule:  # fmt: skip
    """As in `ops.reference`; by rank one kernel goes from importance to lists, and there is no level map."""
    if rule.mode != "topk":
        level_map = assign_block_levels(importance, layout, rule, cap=cap, finite=finite)
        return make_schedule(level_map, factors, layout.block_n)
    schedule = _empty(importance, factors, layout.block_n)
    select_levels(importance, layout, rule.levels, cap, finite, schedule.block_ids, schedule.offsets, factors)
    return schedule


def _empty(like: Tensor, factors: Factors, block_n: int) -> Schedule:
    """A schedule to be filled, for a level map or an importance ``[B, H, M, N]``."""
    batch, heads, num_q, num_k = like.shape
    check_row(num_k, block_n)
    return Schedule(
        block_ids=torch.empty(like.shape, dtype=id_dtype(num_k), device=like.device),
        offsets=torch.empty(batch, heads, num_q, len(factors) + 1, dtype=torch.int32, device=like.device),
        factors=tuple(factors),
        block_n=block_n,
    )


@triton.jit(do_not_specialize=["num_blocks"])
def _schedule_kernel(
    level_map_ptr, block_ids_ptr, offsets_ptr,  # [B, H, M, N] [B, H, M, N] [B, H, M, F + 1]
    num_blocks, FACTORS: tl.constexpr, SIZE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One row. Grid: (M, B * H)."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    o_n = tl.arange(0, SIZE)
    level = tl.load(level_map_ptr + row * num_blocks + o_n, mask=o_n < num_blocks, other=0).to(tl.int32)
    write_lists(level, block_ids_ptr + row * num_blocks, offsets_ptr, row, FACTORS, AT_ONCE)
