"""Ways to read the token grid from the inputs of a denoiser that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


# what it returns depends on values: compiled code has to stop for it
@torch.compiler.disable
def read_coordinates(coordinates: Tensor) -> Grid:
    """Positions ``[3, L]`` (time, row, column) of tokens that end in a grid, frames slowest; other tokens may precede.

    The grid is the longest end of the sequence in which every frame has the rows and columns of the last, and is later
    than the frame before. Keyframes, which precede it, do not continue it: the grid begins with the earliest time.
    """
    coordinates = coordinates.cpu()
    time, row = coordinates[0], coordinates[1]
    in_frame = time == time[-1]
    area = _count_at_end(in_frame)
    width = _count_at_end(in_frame & (row == row[-1]))
    rest = len(time) % area
    frames = coordinates[:, rest:].unflatten(1, (-1, area))
    alike = (frames[1:] == frames[1:, -1:]).all(2).all(0) & (frames[0] == frames[0, :, :1]).all(1)
    later = frames[0, 1:, 0] > frames[0, :-1, 0]
    return 1 + _count_at_end(alike[:-1] & later), area // width, width


def _count_at_end(flags: Tensor) -> int:
    return int(flags.flip(0).long().cumprod(0).sum())
