"""ChronoEdit: Wan that edits an image by making a video of the change."""

from __future__ import annotations

from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.models.wan_attention import WanPSAProcessor

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_chronoedit.WanAttnProcessor": {"184ebefc0184", "a000dc173c7f"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


FAMILY = Family(
    name="ChronoEdit",
    denoisers=("ChronoEditTransformer3DModel",),
    attentions=r"blocks\.\d+\.attn1",
    sections=(SectionRule("ChronoEdit_14b", 40, 40),),
    processor=WanPSAProcessor,
    pipelines=("ChronoEditPipeline",),
)
register_family(FAMILY)
