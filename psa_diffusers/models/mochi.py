"""Mochi: video and then padded text in one sequence, with learned rotary angles for each head.

Mirrors `MochiAttnProcessor2_0` of diffusers/models/attention_processor.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.joint_attention import count_valid, project, project_back
from psa_diffusers.models.registry import Family, SectionRule, make_instance_of, register_family
from psa_diffusers.processors.base import FamilyProcessor

UPSTREAM = "diffusers.models.attention_processor.MochiAttnProcessor2_0"
UPSTREAM_DIGESTS = {
    UPSTREAM: {"78e91a5c57e8", "56050b08e51d"},
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
        projected = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb, rotate)
        q, k, v = (x.transpose(1, 2) for x in projected)
        out = self.sparse_padded(q, k, v, text_tokens=text, text_lengths=self.site.text_lengths)
        out = out.transpose(1, 2).flatten(2)
        return project_back(attn, out[:, :-text], out[:, -text:])


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn neighbouring channels of ``[B, L, H, D]`` by angles whose cosines and sines are ``[L, H, D / 2]``."""
    if rotary is None:
        return x
    cos, sin = rotary
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)


def read_text(config: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    return count_valid(inputs["encoder_attention_mask"])


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
        make_default=make_instance_of(UPSTREAM),
        pipelines=("MochiPipeline",),
        sparse="every self-attention, over video and valid text; padding is left out, as upstream does",
    )
)
