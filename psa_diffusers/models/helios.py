"""Helios: video made chunk by chunk, from a history in front that gets coarser the older it is.

Mirrors `HeliosAttnProcessor` of diffusers/models/transformers/transformer_helios.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.models.wan_attention import project
from psa_diffusers.processors.base import FamilyProcessor, Projected

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_helios.HeliosAttnProcessor": {"cee6afffceee"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class HeliosPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a Helios block; the history is read in full."""

    arguments = (
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "rotary_emb",
        "original_context_length",
    )
    has_context = True

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        q, k, v = project(attn, given["hidden_states"])
        if (angles := given.get("rotary_emb")) is not None:
            from diffusers.models.transformers.transformer_helios import apply_rotary_emb_transposed

            q, k = apply_rotary_emb_transposed(q, angles), apply_rotary_emb_transposed(k, angles)
        history = self.context_tokens(given["hidden_states"])
        if attn.is_amplify_history and history:
            scale = 1.0 + torch.sigmoid(attn.history_key_scale) * (attn.max_scale - 1.0)
            scale = scale.view(1, 1, -1, 1) if attn.history_scale_mode == "per_head" else scale
            k = torch.cat([k[:, :history] * scale, k[:, history:]], dim=1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


FAMILY = Family(
    name="Helios",
    denoisers=("HeliosTransformer3DModel",),
    attentions=r"blocks\.\d+\.attn1",
    text_first=True,
    sections=(SectionRule("Helios", 40, 40),),
    processor=HeliosPSAProcessor,
    pipelines=("HeliosPipeline", "HeliosPyramidPipeline"),
    sparse="every video self-attention over the chunk that is being made",
    dense="the history: it has no one grid, so it reads, and is read, at full resolution",
)
register_family(FAMILY)
