"""Mochi: video and then padded text in one sequence, with learned rotary angles for each head.

Mirrors `MochiAttnProcessor2_0` of diffusers/models/attention_processor.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.models.joint_attention import JointPSAProcessor, count_valid, project
from psa_diffusers.models.registry import Family, SectionRule, make_instance_of, register_family
from psa_diffusers.processors.base import Projected

UPSTREAM = "diffusers.models.attention_processor.MochiAttnProcessor2_0"
UPSTREAM_DIGESTS = {
    UPSTREAM: {"78e91a5c57e8", "56050b08e51d"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class MochiPSAProcessor(JointPSAProcessor):
    """Pyramid sparse self-attention of a Mochi block."""

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        video, text = given["hidden_states"], given["encoder_hidden_states"]
        q, k, v = project(attn, video, text, given.get("image_rotary_emb"), rotate)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


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


FAMILY = Family(
    name="Mochi",
    denoisers=("MochiTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    text_first=False,
    read_text=read_text,
    timesteps_rise=True,
    sections=(SectionRule("Mochi", 24, 48),),
    processor=MochiPSAProcessor,
    make_default=make_instance_of(UPSTREAM),
    pipelines=("MochiPipeline",),
    sparse="every self-attention, over video and valid text; padding is left out, as upstream does",
)
register_family(FAMILY)
