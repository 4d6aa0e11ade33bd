"""EasyAnimate: text and then video in one sequence, in blocks with two streams and then blocks with one.

Mirrors `EasyAnimateAttnProcessor2_0` of diffusers/models/transformers/transformer_easyanimate.py, one call changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psa_diffusers.models.cogvideox_attention import rotate_behind
from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.joint_attention import norm, project_back
from psa_diffusers.models.registry import Family, SectionRule, make_instance_of, register_family
from psa_diffusers.processors.base import FamilyProcessor

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
        rotate_behind(text, (q, k), image_rotary_emb)
        out = self.sparse(q, k, v, text_tokens=text).transpose(1, 2).flatten(2).to(q.dtype)
        return project_back(attn, out[:, text:], out[:, :text])


def project(attn: nn.Module, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed q, k and v ``[B, H, L, D]`` of text and then video."""

    def heads_of(tokens: Tensor, *projections: nn.Module) -> list[Tensor]:
        return [to(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for to in projections]

    has_two_streams = attn.add_q_proj is not None
    tokens = video if has_two_streams else torch.cat([text, video], dim=1)
    q, k, v = heads_of(tokens, attn.to_q, attn.to_k, attn.to_v)
    q, k = norm(attn.norm_q, q), norm(attn.norm_k, k)
    if has_two_streams:
        text_q, text_k, text_v = heads_of(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k = norm(attn.norm_added_q, text_q), norm(attn.norm_added_k, text_k)
        q, k, v = torch.cat([text_q, q], dim=2), torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
    return q, k, v


register_family(
    Family(
        name="EasyAnimate",
        denoisers=("EasyAnimateTransformer3DModel",),
        attentions=r"transformer_blocks\.\d+\.attn1",
        read_grid=read_latents,
        text_first=True,
        sections=(SectionRule("EasyAnimate", 48, 48),),
        processor=EasyAnimatePSAProcessor,
        make_default=make_instance_of(UPSTREAM),
        pipelines=("EasyAnimatePipeline", "EasyAnimateInpaintPipeline", "EasyAnimateControlPipeline"),
    )
)
