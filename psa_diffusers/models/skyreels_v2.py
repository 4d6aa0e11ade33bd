"""SkyReels-V2: Wan that makes long videos segment by segment, with or without a timestep for each frame."""

from __future__ import annotations

from typing import Any

from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.models.wan_attention import WanPSAProcessor

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2AttnProcessor": {"aa8d7b394082", "be927e58ea7f"},
    "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2AttnProcessor2_0": {"ba180e96db22"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested.

The second is diffusers 0.35; in later versions a function of that name makes the first.
"""


def make_default(config: Any, path: str, attn: Any) -> Any:
    from diffusers.models.transformers import transformer_skyreels_v2 as upstream

    made = getattr(upstream, "SkyReelsV2AttnProcessor", None) or upstream.SkyReelsV2AttnProcessor2_0
    return made()


FAMILY = Family(
    name="SkyReels-V2",
    denoisers=("SkyReelsV2Transformer3DModel",),
    attentions=r"blocks\.\d+\.attn1",
    sections=(SectionRule("SkyReels-V2", 12, 30), SectionRule("SkyReels-V2", 40, 40)),
    processor=WanPSAProcessor,
    make_default=make_default,
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    dense="calls with `causal_block_size` above 1: their block-causal mask forbids what PSA would read",
)
register_family(FAMILY)
