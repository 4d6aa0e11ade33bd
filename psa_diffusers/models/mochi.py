"""Mochi: video and then padded text in one sequence, with learned rotary angles for each head.

Mirrors `MochiAttnProcessor2_0` of diffusers/models/attention_processor.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.joint_attention import count_valid
from psa_diffusers.models.processor import FamilyProcessor
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS = {
    "diffusers.models.attention_processor.MochiAttnProcessor2_0": {"78e91a5c57e8", "56050b08e51d"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class MochiPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a Mochi block."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        reason = self.why_dense(attn, hidden_states, None)  # the mask is that of the text, which is left out instead
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
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = rotate(q, *image_rotary_emb), rotate(k, *image_rotary_emb)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (to(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for to in added)
        text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        pairs = ((q, text_q), (k, text_k), (v, text_v))
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)

        out = self.sparse_padded(q, k, v, text_tokens=text, text_lengths=self.site.text_lengths)
        out = out.transpose(1, 2).flatten(2)
        video, text = out[:, :-text], out[:, -text:]
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of ``[B, L, H, D]`` by the angles of ``[L, H, D / 2]``."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)


def read_text(config: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    return count_valid(inputs["encoder_attention_mask"])


def make_default(config: Any, path: str, attn: nn.Module) -> Any:
    from diffusers.models.attention_processor import MochiAttnProcessor2_0

    return MochiAttnProcessor2_0()


register_family(
    Family(
        name="Mochi",
        denoisers=("MochiTransformer3DModel",),
        attentions=r"transformer_blocks\.\d+\.attn1",
        read_grid=read_latents,
        text_first=False,
        read_text=read_text,
        timesteps_rise=True,
        sections=(SectionRule("Mochi", 24, 48),),
        processor=MochiPSAProcessor,
        make_default=make_default,
        pipelines=("MochiPipeline",),
        sparse="every self-attention, over video and valid text; padding is left out, as upstream does",
    )
)
