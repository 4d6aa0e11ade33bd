"""The token grid among tokens of which only the positions are known."""

from __future__ import annotations

import torch
from torch import Tensor

from psa_diffusers.models.registry import Placed


# what it returns depends on values: compiled code has to stop for it
@torch.compiler.disable
def find_grid(coordinates: Tensor) -> Placed:
    """Find the video among tokens with positions ``[3, L]`` (time, row, column); context may stand on either side.

    A frame is a piece of one time in raster order. A run is a row of frames of which each has the rows and columns of
    the one before and is later. Of the runs that begin the earliest (before 0 does not count) the longest is the video,
    the last one of several: keyframes begin later, and what a window keeps of the one before it is shorter than its own
    frames.
    """
    coordinates = coordinates.cpu()
    runs: list[tuple[float, int, int, int]] = []  # time of the first frame, first token, tokens, tokens of a frame
    first = 0
    for size in _frames(coordinates):
        now, before = coordinates[:, first : first + size], coordinates[:, first - size : first]
        time, began, tokens, area = runs[-1] if runs else (0.0, 0, 0, 0)
        if area == size and now[0, 0] > before[0, 0] and now[1:].equal(before[1:]):
            runs[-1] = time, began, tokens + size, area
        else:
            runs.append((float(now[0, 0]), first, size, size))
        first += size
    earliest = min((time for time, *_ in runs if time >= 0), default=min(time for time, *_ in runs))
    _, first, tokens, area = max((run for run in runs if run[0] == earliest), key=lambda run: (run[2], run[1]))
    width = int(torch.unique_consecutive(coordinates[1, first : first + area], return_counts=True)[1][0])
    return Placed((tokens // area, area // width, width), first)


def _frames(coordinates: Tensor) -> list[int]:
    """Tokens of each piece of the sequence in which time stands still and places go on in raster order."""
    (time, row, column), (next_time, next_row, next_column) = coordinates[:, :-1], coordinates[:, 1:]
    goes_on = (next_time == time) & ((next_row > row) | (next_row == row) & (next_column > column))
    ends = [*((~goes_on).nonzero()[:, 0] + 1).tolist(), coordinates.shape[1]]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
