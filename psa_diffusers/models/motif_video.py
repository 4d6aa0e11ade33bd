"""Motif-Video: HunyuanVideo's blocks, the last of them over a second copy of the video instead of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.grid import read_latents
from psa_diffusers.models.joint_attention import JointPSAProcessor, count_valid, project
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_motif_video.MotifVideoAttnProcessor2_0": {"896d47392109"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class MotifVideoPSAProcessor(JointPSAProcessor):
    """Pyramid sparse self-attention of a Motif-Video block."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        is_decoder = encoder_hidden_states.shape == hidden_states.shape and attention_mask is None
        if not is_decoder or self.why_dense(attn, hidden_states, attention_mask):
            return super().__call__(*arguments)
        # the video and the encoder's version of it: a grid of twice the frames
        frames, height, width = self.site.grid
        q, k, v = (x.transpose(1, 2) for x in project(attn, hidden_states, encoder_hidden_states, image_rotary_emb))
        out = self.sparse(q, k, v, grid=(2 * frames, height, width)).transpose(1, 2).flatten(2)
        return out.chunk(2, dim=1)


def read_text(config: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """All image tokens and the valid ones of the text behind them."""
    text, mask, image = (inputs.get(n) for n in ("encoder_hidden_states", "encoder_attention_mask", "image_embeds"))
    lengths = torch.full((len(text),), text.shape[1]) if mask is None else count_valid(mask)
    if lengths is None or image is None:
        return lengths
    return lengths + image.shape[1]


register_family(
    Family(
        name="Motif-Video",
        denoisers=("MotifVideoTransformer3DModel",),
        attentions=r"(single_)?transformer_blocks\.\d+\.attn",
        read_grid=read_latents,
        text_first=False,
        read_text=read_text,
        sections=(SectionRule("Motif-Video", 24, 20),),
        processor=MotifVideoPSAProcessor,
        pipelines=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
        sparse="the attention of all blocks, over video and valid text; padding is left out. The decoder's blocks, "
        "which attend to two versions of the video, see a grid of twice the frames",
    )
)
