"""HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .case import DROP, Case
from .parts import NO_TEXTS, assemble, denoiser, embeds_for_prompts, guider, one_picture, seeded, set_guider, siglip


def hunyuan_video15(
    pipeline: str = "HunyuanVideo15Pipeline", parts: dict[str, Any] | None = None, **transformer: Any
) -> Any:
    pipe = assemble(
        pipeline,
        transformer=denoiser(
            "HunyuanVideo15Transformer3DModel",
            transformer,
            in_channels=2 * 4 + 1,
            out_channels=4,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=seeded(
            diffusers.AutoencoderKLHunyuanVideo15,
            latent_channels=4,
            block_out_channels=(16, 16, 16, 16, 16),
            layers_per_block=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=guider(),
        **NO_TEXTS,
        **(parts or {}),
    )
    pipe.vision_num_semantic_tokens = 8
    return pipe


def _with_glyphs(embeds: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of five tokens for glyphs, the first two are valid."""
    glyphs = {
        "prompt_embeds_2": embeds[:, :5],
        "prompt_embeds_mask_2": (torch.arange(5) < 2).long().repeat(len(embeds), 1),
    }
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask, **glyphs}


def _embeds(asked: dict[str, Any]) -> dict[str, Any]:
    given = {"guidance_scale": DROP, "max_sequence_length": DROP}
    return given | embeds_for_prompts(asked, _with_glyphs)


def _set_area(pipe: Any, asked: dict[str, Any]) -> None:
    """The pipeline makes videos of the area that its checkpoint was trained for."""
    pipe.target_size = (asked["height"] * asked["width"]) ** 0.5
    set_guider(pipe, asked)


HUNYUAN_VIDEO15 = {
    "family": "HunyuanVideo 1.5",
    "attentions": r"transformer_blocks\.\d+\.attn",
    "passes": 2,
    "padded": 0,
}
MORE = {
    "hunyuan-video-1.5": Case(
        pipeline="HunyuanVideo15Pipeline",
        build=hunyuan_video15,
        text=2,
        translate=_embeds,
        prepare=set_guider,
        **HUNYUAN_VIDEO15,
    ),
    "hunyuan-video-1.5-i2v": Case(
        pipeline="HunyuanVideo15ImageToVideoPipeline",
        build=lambda **kw: hunyuan_video15("HunyuanVideo15ImageToVideoPipeline", siglip(), **kw),
        text=2 + 4,
        extra=lambda height, width, frames: one_picture(height - 1, width, frames),
        translate=lambda asked: {**_embeds(asked), "height": DROP, "width": DROP},
        prepare=_set_area,
        several=False,
        **HUNYUAN_VIDEO15,
    ),
}
