"""Kandinsky 5: video tokens only; text enters by cross-attention.

Mirrors `Kandinsky5AttnProcessor` of diffusers/models/transformers/transformer_kandinsky.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.models.registry import Family, Grid, SectionRule, register_family
from psa_diffusers.processors.base import FamilyProcessor, Projected, split_heads

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5AttnProcessor": {"5cc3419de992"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class Kandinsky5PSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention over the video of a Kandinsky 5 block."""

    arguments = ("hidden_states", "encoder_hidden_states", "rotary_emb", "sparse_params")

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        projections = (attn.to_query, attn.to_key, attn.to_value)
        q, k, v = split_heads(given["hidden_states"], attn.num_heads, *projections)
        q, k = attn.query_norm(q.float()).type_as(q), attn.key_norm(k.float()).type_as(k)
        if (rotations := given.get("rotary_emb")) is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def put_out(self, attn: Any, out: Tensor, given: Mapping[str, Any]) -> Tensor:
        return attn.out_layer(out.transpose(1, 2).flatten(2))

    def why_not(self, given: Mapping[str, Any]) -> str:
        return "the model's own block-sparse attention is in use" if given.get("sparse_params") is not None else ""

    def head_dim(self, attn: Any) -> int:
        return attn.to_query.out_features // attn.num_heads


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring channels of ``[B, L, H, D]`` by ``[1, L, 1, D / 2, 2, 2]``, rounded to bfloat16 as upstream."""
    pairs = x.unflatten(-1, (-1, 1, 2)).float()
    return (rotations * pairs).sum(-1).flatten(-2).to(torch.bfloat16).type_as(x)


def read_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    """Latents ``[B, F, H, W, C]`` in patches."""
    latents = inputs.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    frames, height, width = (size // edge for size, edge in zip(latents.shape[1:4], config.patch_size, strict=True))
    return frames, height, width


def read_size(config: Any) -> tuple[int, int]:
    return config.model_dim // sum(config.axes_dims), config.num_visual_blocks


FAMILY = Family(
    name="Kandinsky 5",
    denoisers=("Kandinsky5Transformer3DModel",),
    attentions=r"visual_transformer_blocks\.\d+\.self_attention",
    read_grid=read_grid,
    sections=(SectionRule("Kandinsky5", 28, 32), SectionRule("Kandinsky5", 32, 60)),
    read_size=read_size,
    processor=Kandinsky5PSAProcessor,
    pipelines=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
    dense="checkpoints with `attention_type` nabla (10-second videos): they run the block-sparse attention that "
    "they were trained with",
)
register_family(FAMILY)
