"""Helios: video made chunk by chunk, from a history in front that gets coarser the older it is.

Mirrors `HeliosAttnProcessor` of diffusers/models/transformers/transformer_helios.py, one call changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.models.wan_attention import project
from psa_diffusers.processors.base import FamilyProcessor

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_helios.HeliosAttnProcessor": {"cee6afffceee"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class HeliosPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a Helios block; the history is read in full."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        original_context_length: int | None = None,
    ) -> Tensor:
        reason = self.why_dense(attn, hidden_states, attention_mask, context=True)
        if encoder_hidden_states is not None:
            reason = "cross-attention"
        if reason:
            arguments = (hidden_states, encoder_hidden_states, attention_mask, rotary_emb, original_context_length)
            return self.dense(reason, hidden_states.shape[1], attn, *arguments)
        q, k, v = project(attn, hidden_states)
        if rotary_emb is not None:
            from diffusers.models.transformers.transformer_helios import apply_rotary_emb_transposed

            q, k = apply_rotary_emb_transposed(q, rotary_emb), apply_rotary_emb_transposed(k, rotary_emb)
        history = self.context_tokens(hidden_states)
        if attn.is_amplify_history and history:
            scale = 1.0 + torch.sigmoid(attn.history_key_scale) * (attn.max_scale - 1.0)
            scale = scale.view(1, 1, -1, 1) if attn.history_scale_mode == "per_head" else scale
            k = torch.cat([k[:, :history] * scale, k[:, history:]], dim=1)

        out = self.sparse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), text_tokens=history)
        out = out.transpose(1, 2).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


register_family(
    Family(
        name="Helios",
        denoisers=("HeliosTransformer3DModel",),
        attentions=r"blocks\.\d+\.attn1",
        read_grid=read_latents,
        text_first=True,
        sections=(SectionRule("Helios", 40, 40),),
        processor=HeliosPSAProcessor,
        pipelines=("HeliosPipeline", "HeliosPyramidPipeline"),
        sparse="every video self-attention over the chunk that is being made",
        dense="the history: it has no one grid, so it reads, and is read, at full resolution",
    )
)
