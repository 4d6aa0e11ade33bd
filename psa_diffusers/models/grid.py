"""Ways to read the token grid from the inputs of a denoiser that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
