"""CogVideoX."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from .case import DROP, TEXT_TOKENS, Case
from .parts import assemble, denoiser, pictures, seeded, t5

SMALL = {
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "sample_width": 32,
    "sample_height": 32,
    "sample_frames": 9,
    "max_text_seq_length": TEXT_TOKENS,
}


def cogvideox_transformer(
    *, heads: int = 2, head_dim: int = 16, layers: int = 2, rotary: bool = True, patch_size_t: int | None = None,
    in_channels: int = 4, seed: int = 0,
) -> CogVideoXTransformer3DModel:  # fmt: skip
    changes = {"num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "seed": seed}
    return denoiser(
        "CogVideoXTransformer3DModel",
        changes,
        **SMALL,
        in_channels=in_channels,
        patch_size=2,
        patch_size_t=patch_size_t,
        patch_bias=patch_size_t is None,
        use_rotary_positional_embeddings=rotary,
    )


def cogvideox(pipeline_class: type | str = CogVideoXPipeline, model: Any = None, **transformer: Any) -> Any:
    vae = seeded(
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return assemble(
        pipeline_class,
        **t5(),
        vae=vae,
        transformer=model or cogvideox_transformer(**transformer),
        scheduler=CogVideoXDDIMScheduler(),
    )


def _image(height: int, width: int, frames: int) -> dict[str, Any]:
    return {"image": torch.linspace(0, 1, 3 * height * width).view(1, 3, height, width)}


def _video(height: int, width: int, frames: int) -> dict[str, Any]:
    video = torch.linspace(0, 1, frames * 3 * height * width).view(1, frames, 3, height, width)
    return {"video": video, "strength": 1.0, "num_frames": DROP}


COGVIDEOX = {"family": "CogVideoX", "attentions": r"transformer_blocks\.\d+\.attn1", "text": TEXT_TOKENS}
BASIC = {
    "cogvideox": Case(pipeline="CogVideoXPipeline", build=cogvideox, **COGVIDEOX),
    "cogvideox-sincos": Case(
        pipeline="CogVideoXPipeline", build=lambda **kw: cogvideox(rotary=False, **kw), **COGVIDEOX
    ),
    "cogvideox1.5": Case(
        pipeline="CogVideoXPipeline",
        build=lambda **kw: cogvideox(patch_size_t=2, **kw),
        grid=(2, 6, 7),
        latent_frames_per_token=2,
        **COGVIDEOX,
    ),
    "cogvideox-i2v": Case(
        pipeline="CogVideoXImageToVideoPipeline",
        build=lambda **kw: cogvideox("CogVideoXImageToVideoPipeline", in_channels=8, **kw),
        extra=_image,
        several=False,
        **COGVIDEOX,
    ),
    "cogvideox-v2v": Case(
        pipeline="CogVideoXVideoToVideoPipeline",
        build=lambda **kw: cogvideox("CogVideoXVideoToVideoPipeline", **kw),
        extra=_video,
        several=False,
        **COGVIDEOX,
    ),
}
MORE = {
    "cogvideox-control": Case(
        pipeline="CogVideoXFunControlPipeline",
        build=lambda **kw: cogvideox("CogVideoXFunControlPipeline", in_channels=8, **kw),
        extra=lambda height, width, frames: {"control_video": pictures(height, width, frames), "num_frames": DROP},
        several=False,
        **COGVIDEOX,
    ),
}
