"""CogVideoX 1.0 and 1.5, from text, image or video."""

from __future__ import annotations

from typing import Any

from psa_diffusers.models.cogvideox_attention import CogVideoXPSAProcessor, make_default, read_grid
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS = {
    "diffusers.models.attention_processor.CogVideoXAttnProcessor2_0": {"87eefdd3d138", "a1ecc57eaf6a"},
    "diffusers.models.attention_processor.FusedCogVideoXAttnProcessor2_0": {"bd0daec7d78d", "5a1c50f8bf40"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


def _is_demo(config: Any, pipe: Any) -> bool:
    return config.num_attention_heads * config.attention_head_dim <= 512


def _is_1_5(config: Any, pipe: Any) -> bool:
    return config.patch_size_t is not None


def _is_1_0(config: Any, pipe: Any) -> bool:
    return config.patch_size_t is None


FAMILY = Family(
    name="CogVideoX",
    denoisers=("CogVideoXTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    read_grid=read_grid,
    text_first=True,
    sections=(
        SectionRule("demo", None, None, _is_demo),
        SectionRule("CogVideo_2b", 30, 30, _is_1_0),
        SectionRule("CogVideo_5b", 48, 42, _is_1_0),
        SectionRule("CogVideo1.5_5b", 48, 42, _is_1_5),
    ),
    processor=CogVideoXPSAProcessor,
    make_default=make_default,
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
)
register_family(FAMILY)
