"""Stage 6: the level map as lists of key blocks, grouped by factor, that an attention loop can walk."""

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.reference.levels import assign_block_levels
from psa_diffusers.ops.types import Factors, LevelRule, Schedule, id_dtype


def make_schedule(level_map: Tensor, factors: Factors, block_n: int) -> Schedule:
    """Group the kept blocks of every row by factor.

    Args:
        level_map: ``[B, H, M, N]`` integers: a factor of ``factors``, or 0 = skip.
        factors: Factors, ascending.
        block_n: Tokens of a key block before pooling.
    """
    num_blocks = level_map.shape[-1]
    group = torch.full_like(level_map, len(factors))
    for index, factor in enumerate(factors):
        group = torch.where(level_map == factor, index, group)
    ids = group.argsort(dim=-1, stable=True)
    counts = torch.stack([(group == index).sum(-1) for index in range(len(factors))], -1)
    return Schedule(
        block_ids=ids.to(id_dtype(num_blocks)),
        offsets=torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int(),
        factors=tuple(factors),
        block_n=block_n,
    )


def plan_blocks(
    importance: Tensor, layout: Layout, rule: LevelRule, factors: Factors, *,
    cap: Tensor | None = None, finite: Tensor | None = None,
) -> Schedule:  # fmt: skip
    """`assign_block_levels` and `make_schedule` in one: a backend may have a shorter way than over the level map.

    Args:
        importance: ``[B, H, M, N]``, larger is more important.
        layout: Where video and text blocks stand.
        rule: How importance becomes factors.
        factors: Factors, ascending, that ``rule`` and ``cap`` can give, as ``PSAPreset.factors``.
        cap: ``[B, H, N]`` largest factor that each key block bears, from `key_cosine_cap`.
        finite: ``[B, H]`` bool; a head that is not finite reads everything at factor 1.
    """
    level_map = assign_block_levels(importance, layout, rule, cap=cap, finite=finite)
    return make_schedule(level_map, factors, layout.block_n)
