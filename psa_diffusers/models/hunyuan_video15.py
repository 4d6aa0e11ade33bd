"""HunyuanVideo 1.5: blocks with two streams; image, glyph and prompt tokens behind the video, the valid ones first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.models.joint_attention import JointPSAProcessor, make_default_of
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM = "diffusers.models.transformers.transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0"
UPSTREAM_DIGESTS = {
    UPSTREAM: {
        "726352c34114",
        "7bb9b09c8f4a",
    },
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


def read_text(config: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Valid tokens of both texts, and all of the image, unless it is the blank one of text to video."""
    masks = inputs["encoder_attention_mask"], inputs["encoder_attention_mask_2"]
    lengths = sum(mask.bool().sum(1) for mask in masks)
    image = inputs["image_embeds"]
    return (lengths + image.shape[1] * torch.any(image != 0)).cpu()


FAMILY = Family(
    name="HunyuanVideo 1.5",
    denoisers=("HunyuanVideo15Transformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn",
    text_first=False,
    read_text=read_text,
    sections=(SectionRule("HunyuanVideo1.5", 16, 54),),
    processor=JointPSAProcessor,
    make_default=make_default_of(UPSTREAM),
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    sparse="the attention of every block, over video and valid text; padding is left out, and no mask made of it",
)
register_family(FAMILY)
