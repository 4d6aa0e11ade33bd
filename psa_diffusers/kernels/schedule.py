"""Stage 6: the level map as lists of key blocks, grouped by factor, that an attention loop can walk."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.kernels.launch import on_device
from psa_diffusers.kernels.levels import check_row
from psa_diffusers.kernels.tuning import row_warps
from psa_diffusers.stages.schedule import Schedule, id_dtype


def make_schedule(level_map: Tensor, factors: tuple[int, ...], block_n: int) -> Schedule:
    """Group the kept blocks of every row by factor. See `psa_diffusers.stages.schedule.make_schedule`.

    Args:
        level_map: ``[B, H, M, N]`` integers: a factor of ``factors``, or 0 = skip.
        factors: Factors, ascending.
        block_n: Tokens of a key block before pooling.
    """
    batch, heads, num_q, num_k = level_map.shape
    check_row(num_k, block_n)
    block_ids = torch.empty(level_map.shape, dtype=id_dtype(num_k), device=level_map.device)
    offsets = torch.empty(batch, heads, num_q, len(factors) + 1, dtype=torch.int32, device=level_map.device)
    size = max(16, triton.next_power_of_2(num_k))
    with on_device(level_map):
        _schedule_kernel[(num_q, batch * heads)](
            level_map.contiguous(), block_ids, offsets, num_k, FACTORS=tuple(factors), SIZE=size,
            num_warps=row_warps(size), enable_fp_fusion=True,
        )  # fmt: skip
    return Schedule(block_ids=block_ids, offsets=offsets, factors=tuple(factors), block_n=block_n)


@triton.jit(do_not_specialize=["num_blocks"])
def _schedule_kernel(
    level_map_ptr, block_ids_ptr, offsets_ptr,  # [B, H, M, N] [B, H, M, N] [B, H, M, F + 1]
    num_blocks, FACTORS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Counting sort of one row: every block learns its place among those of its factor. Grid: (M, B * H)."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    o_n = tl.arange(0, SIZE)
    level = tl.load(level_map_ptr + row * num_blocks + o_n, mask=o_n < num_blocks, other=0).to(tl.int32)
    offsets_ptr += row * (len(FACTORS) + 1)
    start = 0
    tl.store(offsets_ptr, 0)
    for f in tl.static_range(len(FACTORS)):
        member = (level == FACTORS[f]).to(tl.int32)
        place = start + tl.cumsum(member, 0) - 1
        tl.store(block_ids_ptr + row * num_blocks + place, o_n.to(block_ids_ptr.dtype.element_ty), mask=member > 0)
        start += tl.sum(member, 0)
        tl.store(offsets_ptr + f + 1, start)
