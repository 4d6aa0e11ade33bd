"""What the stages hand to each other, the numbers of the definition, and what a backend must offer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from typing import Protocol, Self, TypeAlias

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout

Factors: TypeAlias = tuple[int, ...]
"""Pooling factors, ascending powers of two; the first is 1."""

Levels: TypeAlias = tuple[tuple[int, float], ...]
"""``(factor, upper bound)`` of intervals of the unit line, finest first; factor 0 skips."""

Thresholds: TypeAlias = tuple[tuple[int, float], ...]
"""``(factor, least mean cosine)``, factors above 1."""

POOLED_CELL = 16  # queries and keys a cell of pooled_mass
SAMPLE_STRIDE = 4  # sampled_max looks at every fourth token
MOMENT_CELL = 16  # queries and keys a cell of pooled_moments
MOMENT_CAP = 8.0  # of the variance term of a logit: one outlier must not hide all other keys from a row
SHAPE_STRIDE = 16  # the shape of the variance is that of every sixteenth key cell
GAIN_QUERY_STRIDE = 512  # the gain of the tilt looks at every 512th query
GAIN_BLOCK_STRIDE = 16  # and every sixteenth key block
KEY_VARIANCE_CAP = 4.0  # of the key-variance term of a logit: one outlier in a cell must not take over the whole row


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Pooled keys and values, all factors in one row index space.

    Cell ``c`` of key block ``j`` at factor ``h > 1`` is row ``bases[h] + j * block_n / h + c``. Factor 1 is not stored:
    its cells are the tokens themselves, read from k and v through ``Layout.key_rows``.

    Attributes:
        factors: Factors a level map may hold, ascending; the first is 1.
        bases: First row of each factor, in the order of ``factors`` (0 for factor 1, which has no rows).
        keys: ``[B, H, P, D]`` mean key of the real tokens of each cell; undefined for an empty cell.
        values: ``[B, H, P, D]`` mean value, likewise.
        log_counts: ``[P]`` float32, log of the number of real tokens of each cell, ``-inf`` where there is none.
        variance: ``[B, H, P]`` float32, mean over channels of the key variance within the cell; None without
            key_variance.
        covariance: ``[B, H, F, D, D]`` float32, at ``factors[f]`` the sum over all real key tokens of
            ``(k - mean key)^T (v - mean value) / L``, the means being those of the token's cell; zero at factor 1.
            None without value_tilt.
        finite: ``[B, H]`` bool, whether all keys and values of the head are finite numbers.
        ready: What to wait for before the covariance is read, on a GPU that is still at it.
        cells: ``[B, H, cells, D]`` mean keys of cells of 16 tokens and ``[B, H, cells]`` their variance (or None): what
            the kernels' estimate of importance reads, kept where no factor has it.
    """

    factors: Factors
    bases: tuple[int, ...]
    keys: Tensor
    values: Tensor
    log_counts: Tensor
    variance: Tensor | None
    covariance: Tensor | None
    finite: Tensor
    ready: torch.cuda.Event | None = None
    cells: tuple[Tensor, Tensor | None] | None = None


def pooled_rows(lanes: int, factors: Factors) -> tuple[tuple[int, ...], int]:
    """First row of each factor in a pyramid over ``lanes`` key lanes, and the number of rows in all."""
    sizes = [lanes // factor if factor > 1 else 0 for factor in factors]
    return tuple(accumulate(sizes[:-1], initial=0)), sum(sizes)


@dataclass(frozen=True)
class LevelRule:
    """How importance becomes factors.

    Attributes:
        levels: Intervals of the ranked blocks, finest first, as ``PSAPreset.levels``.
        mode: ``topk``: the intervals are shares of the blocks. ``thresholdbound``: shares of the row's importance.
        min_full_ratio: For ``thresholdbound``: at least this share of the blocks is at factor 1.
    """

    levels: Levels
    mode: str
    min_full_ratio: float = 0.06


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
    factors: Factors
    block_n: int

    def density(self) -> Tensor:
        """Share of the dense work: mean over all block pairs of 1/factor. A scalar tensor; reading it synchronises."""
        counts = self.offsets.diff(dim=-1).double()
        costs = (count / factor for count, factor in zip(counts.unbind(-1), self.factors, strict=True))
        cost = reduce(torch.add, costs)
        return cost.mean() / self.block_ids.shape[-1]

    def __getitem__(self, heads: int | slice | Sequence[int] | Tensor) -> Self:
        """The schedule of some heads, for q, k and v of these heads.

        Args:
            heads: A head, a slice, or a list or tensor of heads in any order.
        """
        if isinstance(heads, int):
            heads = [range(self.block_ids.shape[1])[heads]]
        ids, offsets = (part[:, heads].contiguous() for part in (self.block_ids, self.offsets))
        return replace(self, block_ids=ids, offsets=offsets)

    def to_level_map(self) -> Tensor:
        """The inverse of `make_schedule`: ``[B, H, M, N]`` int16, int32 with factors above 16,384."""
        slot = torch.arange(self.block_ids.shape[-1], device=self.offsets.device)
        # no table of the factors: to bring one to a GPU would wait for it
        dtype = level_dtype(self.factors)
        level = torch.zeros_like(self.block_ids, dtype=dtype)
        for end, factor in zip(self.offsets[..., 1:].flip(-1).unbind(-1), reversed(self.factors), strict=True):
            level = torch.where(slot < end[..., None], factor, level)
        # entries after the last kept block are undefined: they must not overwrite a kept one
        kept = slot < self.offsets[..., -1:]
        spare = self.block_ids.shape[-1]
        ids = torch.where(kept, self.block_ids.long(), spare)
        level_map = torch.zeros((*ids.shape[:-1], spare + 1), dtype=dtype, device=ids.device)
        return level_map.scatter_(-1, ids, level)[..., :spare]


def id_dtype(num_blocks: int) -> torch.dtype:
    """The smallest signed type that holds every block id."""
    return torch.int16 if num_blocks <= 2**15 else torch.int32


def level_dtype(factors: Factors) -> torch.dtype:
    """The smallest signed type that holds every factor."""
    return torch.int16 if max(factors) < 2**15 else torch.int32


class Backend(Protocol):
    """The stages under the names by which the flow calls them. A backend is a module; `ops.reference` documents each.

    All take q, k, v ``[B, H, L, D]`` with the tokens as the model has them. Backends may be mixed within a call: any of
    them reads the `Pyramid` and the `Schedule` of any other.
    """

    def build_pyramid(
        self,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        factors: Factors,
        *,
        key_variance: bool = False,
        value_tilt: bool = False,
    ) -> Pyramid:
        """Pool keys and values over the cells of every factor."""

    def fit_tilt(self, pyramid: Pyramid, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Pyramid:
        """Scale the covariances of each head by the gain that fits a sample of it."""

    def block_importance(
        self, q: Tensor, k: Tensor, layout: Layout, method: str, scale: float, pyramid: Pyramid | None = None
    ) -> Tensor:
        """Estimate the importance of every key block for every query block: ``[B, H, M, N]``."""

    def key_cosine_cap(self, k: Tensor, layout: Layout, thresholds: Thresholds) -> Tensor:
        """The largest factor at which the keys of a block are still alike: ``[B, H, N]``."""

    def assign_block_levels(
        self,
        importance: Tensor,
        layout: Layout,
        rule: LevelRule,
        *,
        cap: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> Tensor:
        """At which factor each query block reads each key block: a level map ``[B, H, M, N]``."""

    def make_schedule(self, level_map: Tensor, factors: Factors, block_n: int) -> Schedule:
        """Group the kept blocks of every row by factor."""

    def plan_blocks(
        self,
        importance: Tensor,
        layout: Layout,
        rule: LevelRule,
        factors: Factors,
        *,
        cap: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> Schedule:
        """`assign_block_levels` and `make_schedule` in one; there may be a shorter way than over the level map."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, schedule: Schedule, layout: Layout, scale: float
    ) -> Tensor:
        """Read each kept block at its factor, in one softmax: ``[B, H, L, D]``."""
