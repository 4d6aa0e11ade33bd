"""Wan 2.1 and 2.2, all sizes, one or two experts, and Lucy-Edit, which is Wan 2.2 5B with a video to edit."""

from __future__ import annotations

from typing import Any

from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.models.wan_attention import WanPSAProcessor

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_wan.WanAttnProcessor": {"921f720201c2", "3cb730668e36", "13c09feedcfe"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


def _is_demo(config: Any, pipe: Any) -> bool:
    """The demo model: its VAE makes 8 channels, those of the published ones 16 or 48."""
    return config.in_channels == 8


def _has_experts(config: Any, pipe: Any) -> bool:
    """Wan 2.2 A14B: a second expert, a boundary between them, or image latents without an image encoder."""
    if getattr(pipe, "transformer_2", None) is not None:
        return True
    if getattr(getattr(pipe, "config", None), "boundary_ratio", None) is not None:
        return True
    return config.in_channels == 36 and config.image_dim is None


def _is_ti2v(config: Any, pipe: Any) -> bool:
    """Latents of 48 channels; Lucy-Edit has those of the given video beside them."""
    return config.in_channels in (48, 96)


def _is_2_1(config: Any, pipe: Any) -> bool:
    return not _has_experts(config, pipe) and not _is_ti2v(config, pipe)


FAMILY = Family(
    name="Wan",
    denoisers=("WanTransformer3DModel",),
    attentions=r"blocks\.\d+\.attn1",
    sections=(
        SectionRule("demo", None, None, _is_demo),
        SectionRule("Wan2.1_1.3b", 12, 30, _is_2_1),
        SectionRule("Wan2.1_14b", 40, 40, _is_2_1),
        SectionRule("Wan2.2_5B", 24, 30, _is_ti2v),
        SectionRule("Wan2.2_A14B", 40, 40, _has_experts),
    ),
    processor=WanPSAProcessor,
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "LucyEditPipeline"),
    sparse="every video self-attention, of both experts where there are two",
)
register_family(FAMILY)
