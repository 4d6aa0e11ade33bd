"""Pyramid sparse attention for the video pipelines of Hugging Face diffusers."""

from psa_diffusers.attention import assign_levels, psa_attention, pyramid_attention
from psa_diffusers.preset import PSAPreset, list_presets, load_preset

__all__ = ["PSAPreset", "assign_levels", "list_presets", "load_preset", "psa_attention", "pyramid_attention"]
