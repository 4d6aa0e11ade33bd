"""The denoiser families. Importing a family's file registers it."""

from psa_diffusers.models import cogvideox, hunyuan_video, ltx, wan

__all__ = ["cogvideox", "hunyuan_video", "ltx", "wan"]
