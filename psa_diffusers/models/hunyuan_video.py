"""HunyuanVideo, text or image to video: blocks with two streams, then blocks with one; padded text behind the video."""

from __future__ import annotations

from typing import Any

from torch import nn

from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.joint_attention import JointPSAProcessor, read_mask
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0": {
        "ebe29de77eba",
        "79744a7e109e",
        "9d2e9a44e1dc",
    },
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


def make_default(config: Any, path: str, attn: nn.Module) -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

    return AttnProcessor2_0() if "token_refiner" in path else HunyuanVideoAttnProcessor2_0()


register_family(
    Family(
        name="HunyuanVideo",
        denoisers=("HunyuanVideoTransformer3DModel",),
        attentions=r"(single_)?transformer_blocks\.\d+\.attn",
        read_grid=read_latents,
        text_first=False,
        read_text=read_mask,
        sections=(SectionRule("HunyuanVideo", 24, 20),),
        processor=JointPSAProcessor,
        make_default=make_default,
        pipelines=(
            "HunyuanVideoPipeline",
            "HunyuanVideoImageToVideoPipeline",
            "HunyuanSkyreelsImageToVideoPipeline",
        ),
        sparse="the attention of both kinds of blocks, over video and valid text; padding is left out",
    )
)
