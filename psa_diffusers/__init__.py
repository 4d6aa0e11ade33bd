"""Pyramid sparse attention for the video pipelines of Hugging Face diffusers.

    from psa_diffusers import enable_psa

    enable_psa(pipe)                    # the preset of the model, found from the model itself
    frames = pipe(prompt).frames[0]

docs/developer/concept.md says what is computed.
"""

from psa_diffusers.attention import assign_levels, psa_attention, pyramid_attention
from psa_diffusers.calibration import calibrate, record_qkv
from psa_diffusers.lora.load import load_psa_lora, unload_psa_lora
from psa_diffusers.models import families  # noqa: F401 - importing them registers them
from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.presets import PSAPreset, list_presets, load_preset
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.clock import WarmupScheduler
from psa_diffusers.processors.standalone import PSAProcessor

__all__ = [
    "Family",
    "FamilyProcessor",
    "PSAPreset",
    "PSAProcessor",
    "SectionRule",
    "WarmupScheduler",
    "assign_levels",
    "calibrate",
    "disable_psa",
    "enable_psa",
    "list_presets",
    "load_preset",
    "load_psa_lora",
    "psa_attention",
    "psa_report",
    "pyramid_attention",
    "record_qkv",
    "register_family",
    "unload_psa_lora",
]
