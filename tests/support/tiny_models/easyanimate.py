"""EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .case import DROP, Case
from .parts import NO_TEXT, assemble, denoiser, embeds_for_prompts, seeded


def easyanimate(pipeline: str = "EasyAnimatePipeline", **transformer: Any) -> Any:
    return assemble(
        pipeline,
        **NO_TEXT,
        vae=seeded(
            diffusers.AutoencoderKLMagvit,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        transformer=denoiser(
            "EasyAnimateTransformer3DModel",
            transformer,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def easyanimate_control(**transformer: Any) -> Any:
    """diffusers 0.42.1 hands its `encode_prompt` an argument that it does not take."""
    pipe = easyanimate("EasyAnimateControlPipeline", in_channels=12, **transformer)
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda text_encoder_index=0, **kwargs: encode(**kwargs)
    return pipe


def _ramp(height: int, width: int, frames: int) -> torch.Tensor:
    return torch.linspace(0, 1, 3 * frames * height * width).view(1, 3, frames, height, width)


EASYANIMATE = {
    "family": "EasyAnimate",
    "attentions": r"transformer_blocks\.\d+\.attn1",
    "text": 20,
    "translate": lambda asked: {**embeds_for_prompts(asked), "max_sequence_length": DROP},
}
MORE = {"easyanimate": Case(pipeline="EasyAnimatePipeline", build=easyanimate, **EASYANIMATE)}
OTHER = {
    "easyanimate-control": Case(
        pipeline="EasyAnimateControlPipeline",
        build=easyanimate_control,
        extra=lambda height, width, frames: {"control_video": _ramp(height, width, frames)},
        several=False,
        **EASYANIMATE,
    ),
    "easyanimate-inpaint": Case(
        pipeline="EasyAnimateInpaintPipeline",
        build=lambda **kw: easyanimate("EasyAnimateInpaintPipeline", in_channels=9, **kw),
        extra=lambda height, width, frames: {
            "video": _ramp(height, width, frames),
            "mask_video": 255 * torch.ones(1, 1, frames, height, width),
        },
        several=False,
        **EASYANIMATE,
    ),
}
