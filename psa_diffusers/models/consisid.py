"""ConsisID: CogVideoX that keeps the face of a picture, which enters between the blocks."""

from __future__ import annotations

from psa_diffusers.models.cogvideox_attention import CogVideoXPSAProcessor, make_default, read_grid
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS: dict[str, set[str]] = {}
"""Its attention is that of cogvideox.py."""


FAMILY = Family(
    name="ConsisID",
    denoisers=("ConsisIDTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    read_grid=read_grid,
    text_first=True,
    # of the size of CogVideoX-5B, and made from it
    sections=(SectionRule("CogVideo_5b", 48, 42),),
    processor=CogVideoXPSAProcessor,
    make_default=make_default,
    pipelines=("ConsisIDPipeline",),
)
register_family(FAMILY)
