"""EasyAnimate: text and then video in one sequence, in blocks with two streams and then blocks with one.

Mirrors `EasyAnimateAttnProcessor2_0` of diffusers/models/transformers/transformer_easyanimate.py, one call changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.processor import FamilyProcessor
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_easyanimate.EasyAnimateAttnProcessor2_0": {
        "aafa3faa2905",
        "7331664cbe95",
    },
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class EasyAnimatePSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of an EasyAnimate block."""

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
        q, k, v = project(attn, encoder_hidden_states, hidden_states)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            # projections are written in place, as upstream does: they belong to nobody else
            q[:, :, text:] = apply_rotary_emb(q[:, :, text:], image_rotary_emb)
            k[:, :, text:] = apply_rotary_emb(k[:, :, text:], image_rotary_emb)

        out = self.sparse(q, k, v, text_tokens=text).transpose(1, 2).flatten(2).to(q.dtype)
        text, video = out[:, :text], out[:, text:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def project(attn: nn.Module, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed q, k and v ``[B, H, L, D]`` of text and then video."""

    def heads_of(tokens: Tensor, *projections: nn.Module) -> list[Tensor]:
        return [to(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for to in projections]

    def norm(module: nn.Module | None, x: Tensor) -> Tensor:
        return x if module is None else module(x)

    has_two_streams = attn.add_q_proj is not None
    tokens = video if has_two_streams else torch.cat([text, video], dim=1)
    q, k, v = heads_of(tokens, attn.to_q, attn.to_k, attn.to_v)
    q, k = norm(attn.norm_q, q), norm(attn.norm_k, k)
    if has_two_streams:
        text_q, text_k, text_v = heads_of(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k = norm(attn.norm_added_q, text_q), norm(attn.norm_added_k, text_k)
        q, k, v = torch.cat([text_q, q], dim=2), torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
    return q, k, v


def make_default(config: Any, path: str, attn: nn.Module) -> Any:
    from diffusers.models.transformers.transformer_easyanimate import EasyAnimateAttnProcessor2_0

    return EasyAnimateAttnProcessor2_0()


register_family(
    Family(
        name="EasyAnimate",
        denoisers=("EasyAnimateTransformer3DModel",),
        attentions=r"transformer_blocks\.\d+\.attn1",
        read_grid=read_latents,
        text_first=True,
        sections=(SectionRule("EasyAnimate", 48, 48),),
        processor=EasyAnimatePSAProcessor,
        make_default=make_default,
        pipelines=("EasyAnimatePipeline", "EasyAnimateInpaintPipeline", "EasyAnimateControlPipeline"),
    )
)
