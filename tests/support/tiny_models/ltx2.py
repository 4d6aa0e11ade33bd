"""LTX-2."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from .case import DROP, Case
from .ltx import LTX
from .parts import NO_TEXT, assemble, denoiser, embeds_for_prompts, one_picture, picture, seeded


def _connectors() -> Any:
    """Between the text encoder and the two halves of the denoiser."""
    small = {"connector_num_attention_heads": 2, "connector_attention_head_dim": 8, "connector_num_layers": 1}
    halves = {f"{kind}_{name}": value for kind in ("video", "audio") for name, value in small.items()}
    registers = {f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")}
    return seeded(
        diffusers.pipelines.ltx2.LTX2TextConnectors,
        caption_channels=16,
        text_proj_in_factor=1,
        connector_rope_base_seq_len=4096,
        rope_theta=10000.0,
        rope_double_precision=True,
        causal_temporal_positioning=False,
        **halves,
        **registers,
    )


def ltx2(pipeline: str = "LTX2Pipeline", **transformer: Any) -> Any:
    return assemble(
        pipeline,
        **NO_TEXT,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=seeded(
            diffusers.AutoencoderKLLTX2Video,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        audio_vae=seeded(
            diffusers.AutoencoderKLLTX2Audio,
            base_channels=8,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            latent_channels=2,
            mel_bins=16,
        ),
        connectors=_connectors(),
        transformer=denoiser(
            "LTX2VideoTransformer3DModel",
            transformer,
            in_channels=8,
            out_channels=8,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=16,
        ),
        vocoder=None,
    )


def _embeds(asked: dict[str, Any]) -> dict[str, Any]:
    """Embeddings instead of prompts; no guidance but the plain one, and that for sound too."""
    plain = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    sound = {f"audio_{name}": value for name, value in plain.items()}
    guidance = {"spatio_temporal_guidance_blocks": None, "audio_guidance_scale": asked["guidance_scale"]}
    return {**embeds_for_prompts(asked), **plain, **sound, **guidance}


def _keyframe(height: int, width: int, frames: int) -> dict[str, Any]:
    """A frame to begin with, in its place in the grid, and one for later, as tokens behind the grid."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    # newer ones compress the picture with a package of its own unless told not to
    plain = {"crf": 0} if "crf" in inspect.signature(LTX2VideoCondition).parameters else {}
    frame = picture(height, width)
    return {"conditions": [LTX2VideoCondition(frames=frame, index=index, **plain) for index in (0, 1)]}


def _known(pipeline: str, **given: Any) -> dict[str, Any]:
    """Those arguments that a pipeline takes, or that are to be dropped."""
    names = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    return {name: value for name, value in given.items() if name in names or value is DROP}


LTX2 = {**LTX, "family": "LTX-2", "translate": _embeds}
MORE = {
    "ltx2": Case(pipeline="LTX2Pipeline", since="0.38.0", build=ltx2, **LTX2),
    "ltx2.3-condition": Case(
        pipeline="LTX2ConditionPipeline",
        since="0.41.0",
        build=lambda **kw: ltx2("LTX2ConditionPipeline", gated_attn=True, perturbed_attn=True, rope_type="split", **kw),
        context=lambda height, width: height * width,
        extra=_keyframe,
        several=False,
        **LTX2,
    ),
}
OTHER = {
    "ltx2-i2v": Case(
        pipeline="LTX2ImageToVideoPipeline",
        since="0.38.0",
        build=lambda **kw: ltx2("LTX2ImageToVideoPipeline", **kw),
        # newer ones compress the picture with a package of its own unless told not to
        extra=lambda height, width, frames: {
            **one_picture(height, width, frames),
            **_known("LTX2ImageToVideoPipeline", image_crf=0),
        },
        several=False,
        **LTX2,
    ),
    "ltx2-context": Case(
        pipeline="LTX2InContextPipeline",
        build=lambda **kw: ltx2("LTX2InContextPipeline", **kw),
        several=False,
        **LTX2,
    ),
    "ltx2-hdr": Case(
        pipeline="LTX2HDRPipeline",
        build=lambda **kw: ltx2("LTX2HDRPipeline", **kw),
        several=False,
        **{**LTX2, "translate": lambda asked: _known("LTX2HDRPipeline", **_embeds(asked))},
    ),
}
