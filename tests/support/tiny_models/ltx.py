"""LTX-Video."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from .case import Case
from .parts import assemble, denoiser, one_picture, picture, seeded, t5


def ltx(pipeline: str = "LTXPipeline", **transformer: Any) -> Any:
    return assemble(
        pipeline,
        **t5(),
        vae=seeded(
            diffusers.AutoencoderKLLTXVideo,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        ),
        transformer=denoiser(
            "LTXVideoTransformer3DModel",
            transformer,
            in_channels=8,
            out_channels=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _keyframe(height: int, width: int, frames: int) -> dict[str, Any]:
    """A frame to begin with, in its place in the grid, and one for later, as tokens in front of the grid."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    return {"conditions": [LTXVideoCondition(image=picture(height, width), frame_index=index) for index in (0, 8)]}


LTX = {
    "family": "LTX-Video",
    "attentions": r"transformer_blocks\.\d+\.attn1",
    "frames_per_latent": 8,
    "token_pixels": 32,
}
MORE = {
    "ltx": Case(pipeline="LTXPipeline", build=ltx, **LTX),
    "ltx-i2v": Case(
        pipeline="LTXImageToVideoPipeline",
        build=lambda **kw: ltx("LTXImageToVideoPipeline", **kw),
        extra=one_picture,
        **LTX,
    ),
    "ltx-condition": Case(
        pipeline="LTXConditionPipeline",
        build=lambda **kw: ltx("LTXConditionPipeline", **kw),
        extra=_keyframe,
        context=lambda height, width: height * width,
        several=False,
        **LTX,
    ),
}
OTHER = {
    "ltx-long": Case(
        pipeline="LTXI2VLongMultiPromptPipeline",
        build=lambda **kw: ltx("LTXI2VLongMultiPromptPipeline", **kw),
        **LTX,
    ),
}
