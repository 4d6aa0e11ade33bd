"""Cosmos 1, 2 and 2.5: video tokens only; text and image enter by cross-attention.

Mirrors `CosmosAttnProcessor2_0` of diffusers/models/transformers/transformer_cosmos.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psa_diffusers.models.registry import Family, SectionRule, register_family
from psa_diffusers.processors.base import TEXT_ARGUMENTS, FamilyProcessor, Projected, split_heads

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_cosmos.CosmosAttnProcessor2_0": {"3bc2d0052d88", "5ec61c5c7542"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class CosmosPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a Cosmos block."""

    arguments = TEXT_ARGUMENTS

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        heads = split_heads(given["hidden_states"], attn.heads, attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (x.transpose(1, 2) for x in heads)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if (angles := given.get("image_rotary_emb")) is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            q, k = (apply_rotary_emb(x, angles, use_real_unbind_dim=-2) for x in (q, k))
        return q, k, v


def make_default(config: Any, path: str, attn: Any) -> Any:
    from diffusers.models.transformers import transformer_cosmos

    kind = "2_5" if type(attn).__name__ == "CosmosAttention" else "2_0"
    return getattr(transformer_cosmos, f"CosmosAttnProcessor{kind}")()


FAMILY = Family(
    name="Cosmos",
    denoisers=("CosmosTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    sections=(
        SectionRule("Cosmos", 16, 28),
        SectionRule("Cosmos", 32, 28),
        SectionRule("Cosmos", 32, 36),
        SectionRule("Cosmos", 40, 36),
    ),
    processor=CosmosPSAProcessor,
    make_default=make_default,
    pipelines=(
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
    ),
    dense="the few blocks of the control network of Cosmos 2.5 Transfer, which is a model of its own",
)
register_family(FAMILY)
