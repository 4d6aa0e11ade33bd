"""The self-attention of Wan and of the models made from it: video tokens only; text and image enter elsewhere.

Mirrors `WanAttnProcessor` of diffusers/models/transformers/transformer_wan.py, of which diffusers keeps copies for
other models, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.processors.base import FamilyProcessor, Projected


class WanPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a Wan block."""

    arguments = ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        q, k, v = project(attn, given["hidden_states"])
        if (angles := given.get("rotary_emb")) is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def project(attn: Any, tokens: Tensor) -> list[Tensor]:
    """Return normed q, normed k, and v ``[B, L, H, D]``."""
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    q, k = attn.norm_q(q), attn.norm_k(k)
    return [x.unflatten(2, (attn.heads, -1)) for x in (q, k, v)]


def rotate(x: Tensor, angles: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """Turn neighbouring channels of ``[B, L, H, D]``.

    Args:
        x: What is turned.
        angles: Cosines and sines ``[1, L, 1, D]``, each standing there twice; for SkyReels-V2 in diffusers 0.35 complex
            numbers ``[1, 1, L, D / 2]``.
    """
    if isinstance(angles, Tensor):
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles.transpose(1, 2)
        return torch.view_as_real(turned).flatten(-2).type_as(x)
    cos, sin = angles[0][..., 0::2], angles[1][..., 1::2]
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out
