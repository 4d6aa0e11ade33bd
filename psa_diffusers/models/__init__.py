"""The denoiser families. Importing a family's file registers it."""

from psa_diffusers.models import (
    chronoedit,
    cogvideox,
    hunyuan_video,
    ltx,
    skyreels_v2,
    wan,
    wan_animate,
    wan_vace,
)

__all__ = [
    "chronoedit",
    "cogvideox",
    "hunyuan_video",
    "ltx",
    "skyreels_v2",
    "wan",
    "wan_animate",
    "wan_vace",
]
