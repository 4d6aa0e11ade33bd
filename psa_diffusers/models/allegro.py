"""Allegro: video tokens only; text enters by cross-attention.

Mirrors `AllegroAttnProcessor2_0` of diffusers/models/attention_processor.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psa_diffusers.models.registry import Family, SectionRule, make_instance_of, register_family
from psa_diffusers.processors.base import FamilyProcessor, Projected, split_heads

UPSTREAM = "diffusers.models.attention_processor.AllegroAttnProcessor2_0"
UPSTREAM_DIGESTS = {
    UPSTREAM: {"9028d0238ccd", "d22709742596"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class AllegroPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of an Allegro block."""

    arguments = ("hidden_states", "encoder_hidden_states", "attention_mask", "temb", "image_rotary_emb")

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        heads = split_heads(given["hidden_states"], attn.heads, attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (x.transpose(1, 2) for x in heads)
        if (angles := given.get("image_rotary_emb")) is not None:
            from diffusers.models.embeddings import apply_rotary_emb_allegro

            q, k = apply_rotary_emb_allegro(q, *angles), apply_rotary_emb_allegro(k, *angles)
        return q, k, v


FAMILY = Family(
    name="Allegro",
    denoisers=("AllegroTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    sections=(SectionRule("Allegro", 24, 32),),
    processor=AllegroPSAProcessor,
    make_default=make_instance_of(UPSTREAM),
    pipelines=("AllegroPipeline",),
)
register_family(FAMILY)
