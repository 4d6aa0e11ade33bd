"""HunyuanVideo, and the parts of it that Framepack and Kandinsky share."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .case import Case
from .parts import NO_TEXTS, assemble, denoiser, embeds_for_prompts, masked, one_picture, seeded

SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_video_transformer(*, heads: int = 2, layers: int = 1, seed: int = 0, **kwargs: Any) -> Any:
    changes = {"num_attention_heads": heads, "num_layers": layers, "seed": seed}
    return denoiser("HunyuanVideoTransformer3DModel", {**changes, **kwargs}, **SMALL)


def hunyuan_video_vae() -> Any:
    return seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def hunyuan_video(
    pipeline: str = "HunyuanVideoPipeline", parts: dict[str, Any] | None = None, model: Any = None, **transformer: Any
) -> Any:
    return assemble(
        pipeline,
        transformer=model or hunyuan_video_transformer(**transformer),
        vae=hunyuan_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **NO_TEXTS,
        **(parts or {}),
    )


def _pooled(embeds: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**masked(embeds, mask), "pooled_prompt_embeds": embeds[:, 0, :8]}


def hunyuan_video_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    """Embeddings instead of prompts; guidance by a second pass."""
    given = {"true_cfg_scale": asked["guidance_scale"], "guidance_scale": 1.0}
    return given | embeds_for_prompts(asked, _pooled)


HUNYUAN_VIDEO = {
    "family": "HunyuanVideo",
    "attentions": r"(single_)?transformer_blocks\.\d+\.attn",
    "passes": 2,
    "padded": 0,
    "translate": hunyuan_video_embeds,
}
MORE = {
    "hunyuan-video": Case(pipeline="HunyuanVideoPipeline", build=hunyuan_video, **HUNYUAN_VIDEO),
    "hunyuan-video-i2v": Case(
        pipeline="HunyuanVideoImageToVideoPipeline",
        build=lambda **kw: hunyuan_video(
            "HunyuanVideoImageToVideoPipeline", {"image_processor": None}, image_condition_type="token_replace", **kw
        ),
        extra=one_picture,
        several=False,
        **HUNYUAN_VIDEO,
    ),
    "hunyuan-skyreels-i2v": Case(
        pipeline="HunyuanSkyreelsImageToVideoPipeline",
        build=lambda **kw: hunyuan_video("HunyuanSkyreelsImageToVideoPipeline", in_channels=8, **kw),
        extra=one_picture,
        several=False,
        **HUNYUAN_VIDEO,
    ),
}
