"""Motif-Video."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from .case import DROP, Case
from .parts import NO_TEXT, assemble, denoiser, embeds_for_prompts, guider, one_picture, set_guider, siglip
from .wan import wan_vae


def motif_video(pipeline: str = "MotifVideoPipeline", parts: dict[str, Any] | None = None, **transformer: Any) -> Any:
    return assemble(
        pipeline,
        **NO_TEXT,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=wan_vae(),
        transformer=denoiser(
            "MotifVideoTransformer3DModel",
            transformer,
            in_channels=33,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True,
        ),
        guider=guider(),
        **(parts or {}),
    )


def _embeds(asked: dict[str, Any]) -> dict[str, Any]:
    return {**embeds_for_prompts(asked), "guidance_scale": DROP}


def _with_picture(**transformer: Any) -> Any:
    return motif_video(
        "MotifVideoImage2VideoPipeline", {"feature_extractor": siglip()["feature_extractor"]}, **transformer
    )


MOTIF_VIDEO = {
    "family": "Motif-Video",
    "attentions": r"(single_)?transformer_blocks\.\d+\.attn",
    "passes": 2,
    "padded": 0,
    "prepare": set_guider,
    "has_float64": False,
}
MORE = {
    "motif-video": Case(pipeline="MotifVideoPipeline", build=motif_video, translate=_embeds, **MOTIF_VIDEO),
}
OTHER = {
    "motif-video-i2v": Case(
        pipeline="MotifVideoImage2VideoPipeline",
        build=_with_picture,
        extra=one_picture,
        translate=lambda asked: {**_embeds(asked), "prompt": None},
        several=False,
        **MOTIF_VIDEO,
    ),
}
