"""The densities that are tried on every layer, and the shares of factors that have them."""

from __future__ import annotations

__all__ = ["DENSE", "DENSITIES", "ladder_ratios"]

DENSITIES = (0.03, 0.05, 0.07, 0.10, 0.14, 0.20, 0.28, 0.40, 0.55, 0.75)
"""Rungs of the ladder below dense attention."""

DENSE = len(DENSITIES)
"""Number of the last rung, dense attention."""


def ladder_ratios(density: float, block_n: int) -> dict[int, list[float]]:
    """Shares of a given density that read everything, in the proportions of psa_cover.

    Args:
        density: Between 1 / block_n and 1.
        block_n: Keys a block; the rest is read at this factor, at most 128.

    Returns:
        Start and end of the share by factor, as `mask_ratios` of a preset has them.
    """
    coarsest = min(128, block_n)
    finer = [(factor, weight) for factor, weight in ((1, 1.0), (4, 1.37), (16, 1.68)) if factor < coarsest]

    def shares(full: float) -> list[tuple[int, float]]:
        left = 1.0
        found: list[tuple[int, float]] = []
        for factor, weight in finer:
            found.append((factor, min(full * weight, left if factor == 1 else left / 2)))
            left -= found[-1][1]
        return [*found, (coarsest, left)]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(share / factor for factor, share in shares(middle)) < density:
            low = middle
        else:
            high = middle
    ratios, start = {}, 0.0
    for factor, share in shares(low):
        ratios[factor] = [round(start, 4), round(start + share, 4)]
        start += share
    ratios[coarsest][1] = 1.0
    return ratios
