"""Framepack: HunyuanVideo that makes a video window by window, from a history that gets coarser the older it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.models.joint_attention import UPSTREAM, JointPSAProcessor, make_default_of
from psa_diffusers.models.registry import Family, SectionRule, register_family

UPSTREAM_DIGESTS: dict[str, set[str]] = {}
"""Its attention is that of hunyuan_video.py."""


class FramepackPSAProcessor(JointPSAProcessor):
    """Sparse over the window; the history before it is read in full."""

    has_context = True


def read_text(config: Any, inputs: Mapping[str, Any]) -> Tensor:
    """All image tokens and the valid ones of the text behind them."""
    lengths = inputs["encoder_attention_mask"].sum(1, dtype=torch.int)
    return (lengths + inputs["image_embeds"].shape[1]).cpu()


FAMILY = Family(
    name="Framepack",
    denoisers=("HunyuanVideoFramepackTransformer3DModel",),
    attentions=r"(single_)?transformer_blocks\.\d+\.attn",
    text_first=False,
    read_text=read_text,
    sections=(SectionRule("Framepack", 24, 20),),
    processor=FramepackPSAProcessor,
    make_default=make_default_of(UPSTREAM),
    pipelines=("HunyuanVideoFramepackPipeline",),
    sparse="the attention of both kinds of blocks over the window that is being made",
    dense="the history: it has no one grid, so it reads, and is read, at full resolution",
)
register_family(FAMILY)
