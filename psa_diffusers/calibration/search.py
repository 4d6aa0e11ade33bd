"""Choose how dense each layer must be in each part of the run, so that the mean meets a target."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from psa_diffusers.calibration.ladder import DENSE

__all__ = ["Cell", "Kind", "choose", "chosen_densities", "mean"]

Kind = Literal["error", "density"]
"""What a target is for; the other one is to be small."""


@dataclass(frozen=True)
class Cell:
    """One layer in one part of the run.

    Attributes:
        part: Index of the part.
        steps: Its steps, `range(start, stop)`, of num_steps.
        num_steps: Steps of the run.
        layer: Index of the layer.
        error: Mean error at each rung of the ladder, dense last.
        density: Mean density at each rung.
    """

    part: int
    steps: tuple[int, int]
    num_steps: int
    layer: int
    error: tuple[float, ...]
    density: tuple[float, ...]

    @property
    def weight(self) -> int:
        """Steps it stands for."""
        return self.steps[1] - self.steps[0]

    def at(self, kind: Kind) -> tuple[float, ...]:
        """Return its errors or its densities, by rung."""
        return self.error if kind == "error" else self.density


def choose(cells: Sequence[Cell], kind: Kind, target: float) -> list[int]:
    """Choose the rung of each cell: as little density (or error) as possible while the mean of the other is the target.

    One price for all cells first, then single cells are moved until the target leaves no room for another move.

    Args:
        cells: What was measured.
        kind: Which of the two the target is for.
        target: Its mean, at most.

    Returns:
        A rung for each cell.

    Raises:
        ValueError: If even the best rungs do not reach the target.
    """
    other: Kind = "density" if kind == "error" else "error"

    def cheapest(price: float) -> list[int]:
        totals = [[y + price * x for x, y in zip(c.at(kind), c.at(other), strict=True)] for c in cells]
        return [min(range(DENSE + 1), key=total.__getitem__) for total in totals]

    # a high price keeps the budgeted quantity small
    low, high = 1e-9, 1e9
    chosen = cheapest(high)
    if mean(cells, chosen, kind) > target:
        least = mean(cells, chosen, kind)
        raise ValueError(f"target_{kind}={target:g} cannot be reached: the least of the ladder is {least:.3f}")
    for _ in range(100):
        price = math.sqrt(low * high)
        candidate = cheapest(price)
        if mean(cells, candidate, kind) <= target:
            chosen, high = candidate, price
        else:
            low = price
    return _use_what_is_left(cells, chosen, kind, other, target)


def _use_what_is_left(
    cells: Sequence[Cell], chosen: Sequence[int], kind: Kind, other: Kind, target: float
) -> list[int]:
    """Move single cells, the one that gains the most for its cost first, while the target leaves room."""
    moved = list(chosen)
    steps = sum(cell.weight for cell in cells)
    left = target - mean(cells, moved, kind)
    while True:
        best: tuple[float, int, int, float] | None = None
        for index, cell in enumerate(cells):
            x, y, now = cell.at(kind), cell.at(other), moved[index]
            for rung in range(DENSE + 1):
                cost, gain = (x[rung] - x[now]) * cell.weight / steps, (y[now] - y[rung]) * cell.weight
                if gain > 1e-12 and cost <= left and (best is None or gain / max(cost, 1e-12) > best[0]):
                    best = gain / max(cost, 1e-12), index, rung, cost
        if best is None:
            return moved
        moved[best[1]] = best[2]
        left -= best[3]


def mean(cells: Sequence[Cell], chosen: Sequence[int], kind: Kind) -> float:
    """Return the mean error or density of a choice, over the steps that the cells stand for."""
    weights = sum(cell.weight for cell in cells)
    return sum(cell.at(kind)[rung] * cell.weight for cell, rung in zip(cells, chosen, strict=True)) / weights


def chosen_densities(cells: Sequence[Cell], chosen: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Return the density of a choice by part of the run and layer."""
    parts: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for cell, rung in zip(cells, chosen, strict=True):
        parts[cell.part][cell.layer] = round(cell.density[rung], 4)
    return tuple(tuple(layers[layer] for layer in sorted(layers)) for _, layers in sorted(parts.items()))
