"""Wan-Animate: Wan with a pose and a face to follow; the reference image is the first frame of the grid."""

from __future__ import annotations

from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.models.wan_attention import WanPSAProcessor

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_wan_animate.WanAttnProcessor": {"3cb730668e36", "13c09feedcfe"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


FAMILY = Family(
    name="Wan Animate",
    denoisers=("WanAnimateTransformer3DModel",),
    attentions=r"blocks\.\d+\.attn1",
    sections=(SectionRule("Wan2.2_Animate", 40, 40),),
    processor=WanPSAProcessor,
    pipelines=("WanAnimatePipeline",),
    sparse="every video self-attention; not the face adapter, whose queries attend to the face of their frame",
)
register_family(FAMILY)
