"""Motif-Video: HunyuanVideo's blocks, the last of them over a second copy of the video instead of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.models.joint_attention import JointPSAProcessor, count_valid
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_motif_video.MotifVideoAttnProcessor2_0": {"896d47392109"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class MotifVideoPSAProcessor(JointPSAProcessor):
    """Pyramid sparse self-attention of a Motif-Video block."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Any]) -> Tensor:
        if not is_decoder(given):
            return super().attend(q, k, v, given)
        # the video and the encoder's version of it: a grid of twice the frames
        frames, height, width = self._grid()
        return self.sparse(q, k, v, grid=(2 * frames, height, width))

    def put_out(self, attn: Any, out: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if not is_decoder(given):
            return super().put_out(attn, out, given)
        first, second = out.transpose(1, 2).flatten(2).chunk(2, dim=1)
        return first, second


def is_decoder(given: Mapping[str, Any]) -> bool:
    """Whether the block reads two versions of the video instead of video and text."""
    return given["encoder_hidden_states"].shape == given["hidden_states"].shape and given.get("attention_mask") is None


def read_text(config: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """All image tokens and the valid ones of the text behind them."""
    text: Any
    mask: Any
    image: Any
    text, mask, image = (inputs.get(n) for n in ("encoder_hidden_states", "encoder_attention_mask", "image_embeds"))
    lengths = torch.full((len(text),), text.shape[1]) if mask is None else count_valid(mask)
    if lengths is None or image is None:
        return lengths
    return lengths + image.shape[1]


FAMILY = Family(
    name="Motif-Video",
    denoisers=("MotifVideoTransformer3DModel",),
    attentions=r"(single_)?transformer_blocks\.\d+\.attn",
    text_first=False,
    read_text=read_text,
    sections=(SectionRule("Motif-Video", 24, 20),),
    processor=MotifVideoPSAProcessor,
    pipelines=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
    sparse="the attention of all blocks, over video and valid text; padding is left out. The decoder's blocks, "
    "which attend to two versions of the video, see a grid of twice the frames",
)
register_family(FAMILY)
