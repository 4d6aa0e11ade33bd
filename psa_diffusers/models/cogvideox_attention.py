"""The self-attention of CogVideoX and of ConsisID, made from it: text and then video in one sequence.

Mirrors `CogVideoXAttnProcessor2_0` and its fused twin of diffusers/models/attention_processor.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.models.registry import Grid
from psa_diffusers.processors.base import TEXT_ARGUMENTS, FamilyProcessor, Projected, project_out


class CogVideoXPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a CogVideoX block."""

    arguments = TEXT_ARGUMENTS
    text_in_sequence = True

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        text = given["encoder_hidden_states"]
        tokens = torch.cat([text, given["hidden_states"]], dim=1)
        if "Fused" in type(self.original).__name__:
            q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        rotate_behind(text.shape[1], (q, k), given.get("image_rotary_emb"))
        return q, k, v

    def put_out(self, attn: Any, out: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        tokens, text = project_out(attn, out), given["encoder_hidden_states"].shape[1]
        return tokens[:, text:], tokens[:, :text]


def rotate_behind(text: int, projections: tuple[Tensor, ...], rotary: tuple[Tensor, Tensor] | None) -> None:
    """Rotate the video behind so many text tokens in ``[B, H, L, D]``.

    In place, as upstream: projections belong to nobody else.
    """
    if rotary is not None:
        from diffusers.models.embeddings import apply_rotary_emb

        for x in projections:
            x[:, :, text:] = apply_rotary_emb(x[:, :, text:], rotary)


def read_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    """Latents ``[B, F, C, H, W]`` in patches; CogVideoX 1.5 pads the frames to whole patches."""
    latents = inputs.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    _, frames, _, height, width = latents.shape
    depth = getattr(config, "patch_size_t", None) or 1
    return -(-frames // depth), height // config.patch_size, width // config.patch_size


def make_default(config: Any, path: str, attn: Any) -> Any:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0

    return FusedCogVideoXAttnProcessor2_0() if attn.fused_projections else CogVideoXAttnProcessor2_0()
