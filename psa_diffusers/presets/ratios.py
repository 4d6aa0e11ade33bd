"""Mask ratios: which share of the key blocks, from the most to the least important, is read at which pooling factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from psa_diffusers.presets.values import is_int, is_list, is_real, suggest

Levels = tuple[tuple[int, float], ...]
"""`(factor, end)` of every non-empty interval, the most important first; each starts where the one before ends."""

FACTORS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

# 10 % of the key blocks in full, 5 % at half, 20 % at an eighth of their keys, the others skipped: density 0.15
DEFAULT_RATIOS: Levels = ((1, 0.10), (2, 0.15), (8, 0.35), (0, 1.0))

_TOUCHING = 1e-6


def parse_mask_ratios(ratios: Mapping[int | str, Sequence[float]] | Sequence[Sequence[float]]) -> Levels:
    """Check the intervals of `mask_ratios` and bring them into the order of importance.

    Args:
        ratios: Factor to `[start, end]` in any order, a missing factor being an empty interval; or a result of this
            function.

    Returns:
        `(factor, end)` of every non-empty interval, the most important first. Each starts where the one before ends.

    Raises:
        ValueError: If a factor is unknown, an interval is no pair within [0, 1], the intervals do not cover [0, 1]
            without gap and overlap, or a finer factor follows a coarser one (0, skip, is the coarsest).
    """
    intervals = _as_intervals(ratios)
    if len({factor for factor, _, _ in intervals}) < len(intervals):
        raise ValueError(f"mask_ratios names a factor twice: {ratios!r}; give each factor one interval")

    filled = sorted((start, end, factor) for factor, start, end in intervals if end - start > _TOUCHING)
    shown = ", ".join(f"{factor}: [{start:g}, {end:g}]" for start, end, factor in filled) or "nothing"
    reached = 0.0
    for start, end, factor in filled:
        if abs(start - reached) > _TOUCHING:
            problem = "leave a gap before" if start > reached else "overlap at"
            raise ValueError(
                f"mask_ratios must start at 0, touch, and end at 1; the intervals {problem} factor {factor}, which "
                f"starts at {start:g} where {reached:g} was due: {shown}"
            )
        reached = end
    if abs(reached - 1.0) > _TOUCHING:
        raise ValueError(
            f"mask_ratios must end at 1, but the intervals end at {reached:g}; add 0: [{reached:g}, 1.0]: {shown}"
        )

    by_importance = [factor for _, _, factor in filled]
    if by_importance != sorted(by_importance, key=_coarseness):
        raise ValueError(f"mask_ratios must get coarser as importance falls, 1 first and 0 last; got {shown}")
    levels = [(factor, float(end)) for _, end, factor in filled]
    return (*levels[:-1], (levels[-1][0], 1.0))


def coarsen(levels: Levels, largest: int, *, keep_density: bool) -> Levels:
    """Return levels without factors above the largest, which takes their place.

    Args:
        levels: Levels, as `parse_mask_ratios` returns them.
        largest: The largest factor that is left.
        keep_density: Reading the replaced shares at the largest factor costs more: shrink the finer shares, all by one
            ratio, until the density is as before.
    """
    starts = (0.0, *(end for _, end in levels[:-1]))
    shares: dict[int, float] = {}
    for (factor, end), start in zip(levels, starts, strict=True):
        shares[min(factor, largest)] = shares.get(min(factor, largest), 0.0) + end - start
    finer = {factor: share for factor, share in shares.items() if 0 < factor < largest}
    if keep_density and finer and largest in shares:
        density = sum((end - start) / factor for (factor, end), start in zip(levels, starts, strict=True) if factor)
        read = sum(finer.values()) + shares[largest]
        cost = sum(share / factor for factor, share in finer.items())
        ratio = (density - read / largest) / (cost - sum(finer.values()) / largest)
        finer = {factor: share * min(max(ratio, 0.0), 1.0) for factor, share in finer.items()}
        shares |= {**finer, largest: read - sum(finer.values())}
    ends, reached = [], 0.0
    for factor in sorted(shares, key=_coarseness):
        if shares[factor] > 0:
            reached += shares[factor]
            ends.append((factor, min(reached, 1.0)))
    return (*ends[:-1], (ends[-1][0], 1.0))


def _coarseness(factor: int) -> float:
    return factor or math.inf


def _as_intervals(ratios: Any) -> list[tuple[int, float, float]]:
    if isinstance(ratios, Mapping):
        return [(_as_factor(factor), *_as_interval(factor, interval)) for factor, interval in ratios.items()]
    intervals: list[tuple[int, float, float]] = []
    start = 0.0
    for pair in ratios if is_list(ratios) else [ratios]:
        if not is_list(pair) or len(pair) != 2:
            raise ValueError(f"mask_ratios must map a factor to [start, end], for example 1: [0.0, 0.1]; got {pair!r}")
        intervals.append((_as_factor(pair[0]), *_as_interval(pair[0], (start, pair[1]))))
        start = intervals[-1][2]
    return intervals


def _as_factor(factor: object) -> int:
    # command lines and JSON give "8"
    number = int(factor) if isinstance(factor, str) and factor.isdigit() else factor
    if not is_int(number) or number not in FACTORS:
        raise ValueError(
            f"mask_ratios: unknown factor {factor!r}.{suggest(factor, FACTORS)} "
            f"Available: {', '.join(map(str, FACTORS))} (0 is skip)"
        )
    return number


def _as_interval(factor: object, interval: Any) -> tuple[float, float]:
    pair = is_list(interval) and len(interval) == 2
    if not pair or not all(is_real(bound) for bound in interval) or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"mask_ratios: factor {factor} needs [start, end] with 0 <= start <= end <= 1, got {interval!r}"
        )
    return float(interval[0]), float(interval[1])
