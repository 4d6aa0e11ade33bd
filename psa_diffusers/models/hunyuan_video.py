"""HunyuanVideo, text or image to video: blocks with two streams, then blocks with one; padded text behind the video."""

from __future__ import annotations

from psa_diffusers.models.joint_attention import UPSTREAM, JointPSAProcessor, make_default_of, read_mask
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS = {
    UPSTREAM: {
        "ebe29de77eba",
        "79744a7e109e",
        "9d2e9a44e1dc",
    },
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


FAMILY = Family(
    name="HunyuanVideo",
    denoisers=("HunyuanVideoTransformer3DModel",),
    attentions=r"(single_)?transformer_blocks\.\d+\.attn",
    text_first=False,
    read_text=read_mask,
    sections=(SectionRule("HunyuanVideo", 24, 20),),
    processor=JointPSAProcessor,
    make_default=make_default_of(UPSTREAM),
    pipelines=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    ),
    sparse="the attention of both kinds of blocks, over video and valid text; padding is left out",
)
register_family(FAMILY)
