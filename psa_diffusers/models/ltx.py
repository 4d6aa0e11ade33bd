"""LTX-Video: video tokens only, keyframes in front of them; text enters by cross-attention.

Mirrors `LTXVideoAttnProcessor` of diffusers/models/transformers/transformer_ltx.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psa_diffusers.models.grid import find_grid
from psa_diffusers.models.registry import Family, Grid, Placed, SectionRule, register_family
from psa_diffusers.processors.base import TEXT_ARGUMENTS, FamilyProcessor, Projected

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_ltx.LTXVideoAttnProcessor": {
        "cfbc4d1b5d5e",
        "e45c9370c217",
        "cac2aabbea3a",
    },
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class LTXPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of an LTX-Video block."""

    arguments = TEXT_ARGUMENTS
    has_context = True

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        tokens = given["hidden_states"]
        q, k, v = attn.norm_q(attn.to_q(tokens)), attn.norm_k(attn.to_k(tokens)), attn.to_v(tokens)
        if (angles := given.get("image_rotary_emb")) is not None:
            from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

            q, k = apply_rotary_emb(q, angles), apply_rotary_emb(k, angles)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v


def read_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | Placed | None:
    """Sizes in tokens; where other tokens may stand beside the grid there are positions instead."""
    if inputs.get("video_coords") is not None:
        return find_grid(inputs["video_coords"][0])
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    return None if frames is None or height is None or width is None else (frames, height, width)


FAMILY = Family(
    name="LTX-Video",
    denoisers=("LTXVideoTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    read_grid=read_grid,
    text_first=True,
    sections=(SectionRule("LTX-Video", 32, 28), SectionRule("LTX-Video", 32, 48)),
    processor=LTXPSAProcessor,
    pipelines=(
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
    ),
    sparse="every video self-attention; keyframes given as tokens of their own are read in full",
)
register_family(FAMILY)
