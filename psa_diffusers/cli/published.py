"""The choice of levels published with PSA for CogVideoX, which ours is held against."""

from __future__ import annotations

from psa_diffusers.presets import PSAPreset

__all__ = ["published_choice"]

_RATIOS = ((1, 0.10), (2, 0.15), (8, 0.35), (0, 1.0))
_DENSITY = 0.15


def published_choice(density: float = _DENSITY, *, name: str = "published") -> PSAPreset:
    """Blocks of 128, Gilbert order, ranked by the largest sampled score: 10 % in full, 5 % at 2, 20 % at 8.

    Args:
        density: At another density than .15 all shares are scaled alike, to at most .42, where all is read.
        name: Name of the preset.

    Raises:
        ValueError: For a density that these shares cannot have.
    """
    if not 0 < density <= 0.42:
        raise ValueError(f"the published shares can be scaled to a density of at most 0.42, got {density:g}")
    scaled = tuple((factor, bound * density / _DENSITY if factor else 1.0) for factor, bound in _RATIOS)
    return PSAPreset(name=name, mask_ratios=scaled, importance="sampled_max")
