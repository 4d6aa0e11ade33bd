"""EasyAnimate: text and then video in one sequence, in blocks with two streams and then blocks with one.

Mirrors `EasyAnimateAttnProcessor2_0` of diffusers/models/transformers/transformer_easyanimate.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.cogvideox_attention import rotate_behind
from psa_diffusers.models.joint_attention import norm, project_back
from psa_diffusers.models.registry import Family, SectionRule, make_instance_of, register_family
from psa_diffusers.processors.base import TEXT_ARGUMENTS, FamilyProcessor, Projected, split_heads

UPSTREAM = "diffusers.models.transformers.transformer_easyanimate.EasyAnimateAttnProcessor2_0"
UPSTREAM_DIGESTS = {
    UPSTREAM: {
        "aafa3faa2905",
        "7331664cbe95",
    },
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class EasyAnimatePSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of an EasyAnimate block."""

    arguments = TEXT_ARGUMENTS
    text_in_sequence = True

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        text = given["encoder_hidden_states"]
        q, k, v = project(attn, text, given["hidden_states"])
        rotate_behind(text.shape[1], (q, k), given.get("image_rotary_emb"))
        return q, k, v

    def put_out(self, attn: Any, out: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        tokens, text = out.transpose(1, 2).flatten(2), given["encoder_hidden_states"].shape[1]
        return project_back(attn, tokens[:, text:], tokens[:, :text])


def project(attn: Any, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed q, k and v ``[B, H, L, D]`` of text and then video."""

    def heads_of(tokens: Tensor, *projections: nn.Module) -> list[Tensor]:
        return [x.transpose(1, 2) for x in split_heads(tokens, attn.heads, *projections)]

    has_two_streams = attn.add_q_proj is not None
    tokens = video if has_two_streams else torch.cat([text, video], dim=1)
    q, k, v = heads_of(tokens, attn.to_q, attn.to_k, attn.to_v)
    q, k = norm(attn.norm_q, q), norm(attn.norm_k, k)
    if has_two_streams:
        text_q, text_k, text_v = heads_of(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k = norm(attn.norm_added_q, text_q), norm(attn.norm_added_k, text_k)
        q, k, v = torch.cat([text_q, q], dim=2), torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
    return q, k, v


FAMILY = Family(
    name="EasyAnimate",
    denoisers=("EasyAnimateTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    text_first=True,
    sections=(SectionRule("EasyAnimate", 48, 48),),
    processor=EasyAnimatePSAProcessor,
    make_default=make_instance_of(UPSTREAM),
    pipelines=("EasyAnimatePipeline", "EasyAnimateInpaintPipeline", "EasyAnimateControlPipeline"),
)
register_family(FAMILY)
