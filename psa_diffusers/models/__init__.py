"""The denoiser families. Importing a family's file registers it."""

from psa_diffusers.models import cogvideox, wan

__all__ = ["cogvideox", "wan"]
