"""Stage 6: the level map as lists of key blocks, grouped by factor, that an attention loop can walk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.reference.levels import assign_block_levels


@dataclass(frozen=True, eq=False)
class Schedule:
    """For each query block, the key blocks it reads.

    Attributes:
        block_ids: ``[B, H, M, N]`` int16 (int32 from 32,768 blocks), kept key blocks first: those of the finest factor,
            then of the next, each group in ascending order. What follows the last kept block is undefined.
        offsets: ``[B, H, M, F + 1]`` int32. Factor ``factors[f]`` owns the entries ``offsets[f] : offsets[f + 1]``.
        factors: Factors, ascending.
        block_n: Tokens of a key block before pooling.
    """

    block_ids: Tensor
    offsets: Tensor
    factors: tuple[int, ...]
    block_n: int

    def density(self) -> Tensor:
        """Share of the dense work: mean over all block pairs of 1/factor. A scalar tensor; reading it synchronises."""
        counts = self.offsets.diff(dim=-1).double()
        cost = sum(count / factor for count, factor in zip(counts.unbind(-1), self.factors, strict=True))
        return cost.mean() / self.block_ids.shape[-1]

    def to_level_map(self) -> Tensor:
        """The inverse of `make_schedule`: ``[B, H, M, N]`` int16."""
        slot = torch.arange(self.block_ids.shape[-1], device=self.offsets.device)
        # no table of the factors: to bring one to a GPU would wait for it
        level = torch.zeros_like(self.block_ids, dtype=torch.int16)
        for end, factor in zip(self.offsets[..., 1:].flip(-1).unbind(-1), reversed(self.factors), strict=True):
            level = torch.where(slot < end[..., None], factor, level)
        # entries after the last kept block are undefined: they must not overwrite a kept one
        kept = slot < self.offsets[..., -1:]
        spare = self.block_ids.shape[-1]
        ids = torch.where(kept, self.block_ids.long(), spare)
        level_map = torch.zeros((*ids.shape[:-1], spare + 1), dtype=torch.int16, device=ids.device)
        return level_map.scatter_(-1, ids, level)[..., :spare]


def make_schedule(level_map: Tensor, factors: tuple[int, ...], block_n: int) -> Schedule:
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
    importance: Tensor,
    layout: Layout,
    levels: tuple[tuple[int, float], ...],
    mode: str,
    factors: tuple[int, ...],
    *,
    min_full_ratio: float = 0.06,
    cap: Tensor | None = None,
    finite: Tensor | None = None,
) -> Schedule:
    """`assign_block_levels` and `make_schedule` in one: a column may have a shorter way than over the level map.

    Args:
        importance: ``[B, H, M, N]``, larger is more important.
        layout: Where video and text blocks stand.
        levels: ``(factor, upper bound)`` of the intervals, finest first, as ``PSAPreset.levels``; factor 0 skips.
        mode: ``topk`` or ``thresholdbound``.
        factors: Factors, ascending, that ``levels`` and ``cap`` can give, as ``PSAPreset.factors``.
        min_full_ratio: For ``thresholdbound``: at least this share of the blocks is at factor 1.
        cap: ``[B, H, N]`` largest factor that each key block bears, from `key_cosine_cap`.
        finite: ``[B, H]`` bool; a head that is not finite reads everything at factor 1.
    """
    level_map = assign_block_levels(
        importance, layout, levels, mode, min_full_ratio=min_full_ratio, cap=cap, finite=finite
    )
    return make_schedule(level_map, factors, layout.block_n)


def id_dtype(num_blocks: int) -> torch.dtype:
    """The smallest signed type that holds every block id."""
    return torch.int16 if num_blocks <= 2**15 else torch.int32
