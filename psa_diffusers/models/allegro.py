"""Allegro: video tokens only; text enters by cross-attention.

Mirrors `AllegroAttnProcessor2_0` of diffusers/models/attention_processor.py, one call changed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.registry import Family, SectionRule, make_instance_of, register_family
from psa_diffusers.processors.base import FamilyProcessor

UPSTREAM = "diffusers.models.attention_processor.AllegroAttnProcessor2_0"
UPSTREAM_DIGESTS = {
    UPSTREAM: {"9028d0238ccd", "d22709742596"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class AllegroPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of an Allegro block."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Any, Any] | None = None,
    ) -> Tensor:
        reason = self.why_dense(attn, hidden_states, attention_mask)
        if encoder_hidden_states is not None:
            reason = "cross-attention"
        if reason:
            return self.dense(
                reason,
                hidden_states.shape[1],
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                temb=temb,
                image_rotary_emb=image_rotary_emb,
            )
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for to in projections)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb_allegro

            q, k = (apply_rotary_emb_allegro(x, *image_rotary_emb) for x in (q, k))

        out = self.sparse(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out))


register_family(
    Family(
        name="Allegro",
        denoisers=("AllegroTransformer3DModel",),
        attentions=r"transformer_blocks\.\d+\.attn1",
        read_grid=read_latents,
        sections=(SectionRule("Allegro", 24, 32),),
        processor=AllegroPSAProcessor,
        make_default=make_instance_of(UPSTREAM),
        pipelines=("AllegroPipeline",),
    )
)
