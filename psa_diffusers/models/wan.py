"""Wan 2.1 and 2.2, all sizes, one or two experts: video tokens only; text and image enter by cross-attention.

Mirrors `WanAttnProcessor` of diffusers/models/transformers/transformer_wan.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.processor import FamilyProcessor
from psa_diffusers.models.registry import Family, Grid, SectionRule, register

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_wan.WanAttnProcessor": {"921f720201c2", "3cb730668e36", "13c09feedcfe"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class WanPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a Wan block."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        reason = self.why_dense(attn, hidden_states, attention_mask)
        if encoder_hidden_states is not None:
            reason = "cross-attention"
        if reason:
            tokens = hidden_states.shape[1]
            return self.dense(reason, tokens, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)

        out = self.sparse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out.transpose(1, 2).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of `[B, L, H, D]` by the angles of `[1, L, 1, D]`; each angle stands there twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def read_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    """Latents `(B, C, F, H, W)` in patches."""
    latents = inputs.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    frames, height, width = (size // patch for size, patch in zip(latents.shape[2:], config.patch_size, strict=True))
    return frames, height, width


def default_processor(attn: nn.Module) -> Any:
    return attn._default_processor_cls()


def _has_experts(config: Any, pipe: Any) -> bool:
    """Wan 2.2 A14B: a second expert, a boundary between them, or image latents without an image encoder."""
    if getattr(pipe, "transformer_2", None) is not None:
        return True
    if getattr(getattr(pipe, "config", None), "boundary_ratio", None) is not None:
        return True
    return config.in_channels == 36 and config.image_dim is None


def _is_ti2v(config: Any, pipe: Any) -> bool:
    return config.in_channels == 48


def _is_2_1(config: Any, pipe: Any) -> bool:
    return not _has_experts(config, pipe) and not _is_ti2v(config, pipe)


register(
    Family(
        name="Wan",
        denoisers=("WanTransformer3DModel",),
        attentions=r"blocks\.\d+\.attn1",
        text_first=True,
        read_grid=read_grid,
        sections=(
            SectionRule("Wan2.1_1.3b", 12, 30, _is_2_1),
            SectionRule("Wan2.1_14b", 40, 40, _is_2_1),
            SectionRule("Wan2.2_5B", 24, 30, _is_ti2v),
            SectionRule("Wan2.2_A14B", 40, 40, _has_experts),
        ),
        processor=WanPSAProcessor,
        default_processor=default_processor,
    )
)
