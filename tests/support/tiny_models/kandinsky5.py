"""Kandinsky 5."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .case import Case
from .hunyuan_video import hunyuan_video_vae
from .parts import NO_TEXTS, assemble, embeds_for_prompts, one_picture, seeded


def kandinsky5(pipeline: str = "Kandinsky5T2VPipeline", **transformer: Any) -> Any:
    model = seeded(
        diffusers.Kandinsky5Transformer3DModel,
        **{
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            **transformer,
        },
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "modulation" in name:  # zeros at first, which would let no attention through
            weight.data.normal_(0, 0.2, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return assemble(pipeline, transformer=model, vae=hunyuan_video_vae(), scheduler=scheduler, **NO_TEXTS)


def _two_texts(embeds: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of two encoders, and where the text of a sample begins."""
    return {
        "prompt_embeds_qwen": embeds,
        "prompt_embeds_clip": embeds[:, 0, :8],
        "prompt_cu_seqlens": torch.arange(len(embeds) + 1, dtype=torch.int32) * embeds.shape[1],
    }


KANDINSKY5 = {
    "family": "Kandinsky 5",
    "attentions": r"visual_transformer_blocks\.\d+\.self_attention",
    "passes": 2,
    "translate": lambda asked: embeds_for_prompts(asked, _two_texts),
    "has_float64": False,
}
MORE = {
    "kandinsky5": Case(pipeline="Kandinsky5T2VPipeline", build=kandinsky5, **KANDINSKY5),
    "kandinsky5-i2v": Case(
        pipeline="Kandinsky5I2VPipeline",
        build=lambda **kw: kandinsky5("Kandinsky5I2VPipeline", visual_cond=True, **kw),
        # the first four frames are matched to those that follow
        grid=(6, 6, 7),
        ragged=(6, 5, 7),
        extra=one_picture,
        several=False,
        **KANDINSKY5,
    ),
}
