"""CogVideoX 1.0 and 1.5: text and video in one sequence, text in front.

Mirrors `CogVideoXAttnProcessor2_0` and its fused twin of diffusers/models/attention_processor.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.processor import FamilyProcessor
from psa_diffusers.models.registry import Family, Grid, SectionRule, register_family

UPSTREAM_DIGESTS = {
    "diffusers.models.attention_processor.CogVideoXAttnProcessor2_0": {"87eefdd3d138", "a1ecc57eaf6a"},
    "diffusers.models.attention_processor.FusedCogVideoXAttnProcessor2_0": {"bd0daec7d78d", "5a1c50f8bf40"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class CogVideoXPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a CogVideoX block."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        reason = self.why_dense(attn, hidden_states, attention_mask)
        if reason:
            return self.dense(
                reason,
                hidden_states.shape[1] + text,
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                image_rotary_emb=image_rotary_emb,
            )
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if "Fused" in type(self.original).__name__:
            q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            # projections are written in place, as upstream does: they belong to nobody else
            q[:, :, text:] = apply_rotary_emb(q[:, :, text:], image_rotary_emb)
            k[:, :, text:] = apply_rotary_emb(k[:, :, text:], image_rotary_emb)

        out = self.sparse(q, k, v, text_tokens=text)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, text:], out[:, :text]


def read_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    """Latents `(B, F, C, H, W)` in patches; 1.5 pads the frames to whole patches."""
    latents = inputs.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    _, frames, _, height, width = latents.shape
    return -(-frames // (config.patch_size_t or 1)), height // config.patch_size, width // config.patch_size


def make_default(config: Any, path: str, attn: nn.Module) -> Any:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0

    return FusedCogVideoXAttnProcessor2_0() if attn.fused_projections else CogVideoXAttnProcessor2_0()


def _is_demo(config: Any, pipe: Any) -> bool:
    return config.num_attention_heads * config.attention_head_dim <= 512


def _is_1_5(config: Any, pipe: Any) -> bool:
    return config.patch_size_t is not None


def _is_1_0(config: Any, pipe: Any) -> bool:
    return config.patch_size_t is None


register_family(
    Family(
        name="CogVideoX",
        denoisers=("CogVideoXTransformer3DModel",),
        attentions=r"transformer_blocks\.\d+\.attn1",
        read_grid=read_grid,
        text_first=True,
        sections=(
            SectionRule("demo", None, None, _is_demo),
            SectionRule("CogVideo_2b", 30, 30, _is_1_0),
            SectionRule("CogVideo_5b", 48, 42, _is_1_0),
            SectionRule("CogVideo1.5_5b", 48, 42, _is_1_5),
        ),
        processor=CogVideoXPSAProcessor,
        make_default=make_default,
        pipelines=(
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
    )
)
