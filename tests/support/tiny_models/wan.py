"""Wan, and the parts of it that the families made out of Wan share."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from .case import DROP, Case
from .parts import assemble, denoiser, picture, pictures, seeded, umt5


def wan_transformer(
    *, kind: str = "WanTransformer3DModel", heads: int = 2, head_dim: int = 16, layers: int = 2, in_channels: int = 16,
    seed: int = 0, **kwargs: Any,
) -> Any:  # fmt: skip
    changes = {"num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "seed": seed}
    return denoiser(
        kind,
        {**changes, **kwargs},
        patch_size=(1, 2, 2),
        in_channels=in_channels,
        out_channels=in_channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def wan_vae() -> AutoencoderKLWan:
    return seeded(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def flow_multistep(**kwargs: Any) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **kwargs)


def wan(
    pipeline_class: type | str = WanPipeline,
    *,
    experts: int = 1,
    multistep: bool = False,
    pipeline: dict[str, Any] | None = None,
    **transformer: Any,
) -> Any:
    many = multistep or experts == 2
    second = {"transformer_2": wan_transformer(**transformer, seed=1)} if experts == 2 else {}
    return assemble(
        pipeline_class,
        **umt5(),
        vae=wan_vae(),
        transformer=wan_transformer(**transformer),
        scheduler=flow_multistep(flow_shift=3.0) if many else FlowMatchEulerDiscreteScheduler(shift=5.0),
        **second,
        **(pipeline or {}),
    )


def wan_i2v(pipeline_class: type | str = WanImageToVideoPipeline, **transformer: Any) -> Any:
    """With keys and values for an image in its cross-attentions."""
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    processor = CLIPImageProcessor(size=8, crop_size=8)
    encoder = {"image_encoder": seeded(CLIPVisionModel, config), "image_processor": processor}
    shape = {"in_channels": 36, "out_channels": 16, "image_dim": 8, "added_kv_proj_dim": 32}
    return wan(pipeline_class, pipeline=encoder, **shape, **transformer)


def wan_image(height: int, width: int, frames: int) -> dict[str, Any]:
    # upstream takes the last 512 context tokens for text when there are image tokens
    return {"image": picture(height, width), "max_sequence_length": 512}


def _video(height: int, width: int, frames: int) -> dict[str, Any]:
    return {"video": pictures(height, width, frames), "strength": 1.0, "num_frames": DROP}


WAN = {"family": "Wan", "attentions": r"blocks\.\d+\.attn1", "passes": 2}
BASIC = {
    "wan2.1": Case(pipeline="WanPipeline", build=wan, **WAN),
    "wan2.1-i2v": Case(pipeline="WanImageToVideoPipeline", build=wan_i2v, extra=wan_image, **WAN),
    "wan2.2-a14b": Case(
        pipeline="WanPipeline", build=lambda **kw: wan(experts=2, pipeline={"boundary_ratio": 0.875}, **kw), **WAN
    ),
    "wan2.2-5b": Case(
        pipeline="WanPipeline",
        build=lambda **kw: wan(in_channels=48, pipeline={"expand_timesteps": True}, **kw),
        **WAN,
    ),
}
MORE = {
    "wan-v2v": Case(
        pipeline="WanVideoToVideoPipeline",
        build=lambda **kw: wan("WanVideoToVideoPipeline", **kw),
        extra=_video,
        several=False,
        **WAN,
    ),
    "wan-flf": Case(
        pipeline="WanImageToVideoPipeline",
        build=lambda **kw: wan_i2v(pos_embed_seq_len=10, **kw),
        extra=lambda height, width, frames: {
            **wan_image(height, width, frames),
            "last_image": picture(height, width).rotate(90),
        },
        several=False,
        **WAN,
    ),
    "lucy-edit": Case(
        pipeline="LucyEditPipeline",
        build=lambda **kw: wan("LucyEditPipeline", in_channels=32, out_channels=16, **kw),
        extra=lambda height, width, frames: {"video": pictures(height, width, frames)},
        several=False,
        **WAN,
    ),
}
