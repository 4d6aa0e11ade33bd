"""Wan VACE: Wan with a second column of blocks that reads what is given (video, mask, references)."""

from __future__ import annotations

from typing import Any

from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.models.wan_attention import WanPSAProcessor

UPSTREAM_DIGESTS: dict[str, set[str]] = {}
"""Its attention is that of wan.py."""


def _has_experts(config: Any, pipe: Any) -> bool:
    return getattr(pipe, "transformer_2", None) is not None


def _has_one_expert(config: Any, pipe: Any) -> bool:
    return not _has_experts(config, pipe)


FAMILY = Family(
    name="Wan VACE",
    denoisers=("WanVACETransformer3DModel",),
    attentions=r"(vace_)?blocks\.\d+\.attn1",
    sections=(
        SectionRule("Wan2.1_1.3b", 12, 30, _has_one_expert),
        SectionRule("Wan2.1_14b", 40, 40, _has_one_expert),
        SectionRule("Wan2.2_A14B", 40, 40, _has_experts),
    ),
    processor=WanPSAProcessor,
    pipelines=("WanVACEPipeline",),
    sparse="every video self-attention, those of the control blocks too; reference images count as frames",
)
register_family(FAMILY)
