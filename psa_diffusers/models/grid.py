"""Ways to read the token grid from the inputs of a denoiser that several families share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psa_diffusers.models.registry import Grid


def read_latents(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    """Latents ``[B, C, F, H, W]`` in patches of `patch_size`, three numbers, or one and `patch_size_t`."""
    latents = inputs.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    frames, height, width = (size // edge for size, edge in zip(latents.shape[2:], patch, strict=True))
    return frames, height, width


class Placed(NamedTuple):
    """A grid in a sequence of tokens.

    Attributes:
        grid: Frames, height, width in tokens.
        first: Tokens that stand before it.
    """

    grid: Grid
    first: int


def read_coordinates(coordinates: Tensor) -> Grid:
    """The grid that `find_grid` finds."""
    return find_grid(coordinates).grid


# what it returns depends on values: compiled code has to stop for it
@torch.compiler.disable
def find_grid(coordinates: Tensor) -> Placed:
    """Find the video among tokens with positions ``[3, L]`` (time, row, column); context may stand on either side.

    A run is a piece of the sequence, frames slowest, in which every frame has the rows and columns of the one before
    and is later. Of the runs that begin the earliest (before 0 does not count) the longest is the video, the last one
    of several: keyframes begin later, and what a window keeps of the one before it is shorter than its own frames.
    """
    coordinates = coordinates.cpu()
    sizes = _count_equal(coordinates[0])
    weight = Counter[int]()
    for size in sizes:
        weight[size] += size
    area = min(weight, key=lambda size: (-weight[size], size))  # two frames of one time look like one of twice the size
    runs: list[tuple[float, int, int]] = []  # time of the first frame, first token, frames
    start = 0
    for size in sizes:
        for first in range(start, start + size, area) if size % area == 0 else ():
            time, began, frames = runs[-1] if runs else (0.0, 0, 0)
            now, before = coordinates[:, first : first + area], coordinates[:, first - area : first]
            if frames and began + frames * area == first and now[0, 0] > before[0, 0] and now[1:].equal(before[1:]):
                runs[-1] = time, began, frames + 1
            else:
                runs.append((float(now[0, 0]), first, 1))
        start += size
    earliest = min((time for time, _, _ in runs if time >= 0), default=min(time for time, _, _ in runs))
    _, first, frames = max((run for run in runs if run[0] == earliest), key=lambda run: (run[2], run[1]))
    width = _count_equal(coordinates[1, first : first + area])[0]
    return Placed((frames, area // width, width), first)


def _count_equal(x: Tensor) -> list[int]:
    """Lengths of the pieces of a line in which neighbours are equal."""
    return torch.unique_consecutive(x, return_counts=True)[1].tolist()
