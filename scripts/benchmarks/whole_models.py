"""Pipelines at real sizes with random weights, for the program that times whole videos."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Model:
    """A pipeline that people run.

    Attributes:
        build: Makes the pipeline on the device.
        video: Height, width and frames of the call.
        call: What else the call is given, tensors aside.
        embeds: Makes the tensors of the prompt: `(device, dtype)`.
        text_encoder: Makes the large text encoder, or None where it is not timed.
        text_tokens: Tokens that it reads.
        tiled: Whether the VAE decodes in tiles.
    """

    build: Callable[[torch.device, torch.dtype], Any]
    video: tuple[int, int, int]
    call: dict[str, Any]
    embeds: Callable[[torch.device, torch.dtype], dict[str, torch.Tensor]]
    text_encoder: Callable[[], torch.nn.Module] | None = None
    text_tokens: int = 512
    tiled: bool = False


def on(device, dtype, make):
    """Make a module right where it belongs, in its dtype: 14 billion weights in float32 would not leave much room."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _wan(transformer, vae=None):
    def build(device, dtype):
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

        return WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=on(device, dtype, lambda: AutoencoderKLWan(**(vae or {}))),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
            transformer=on(device, dtype, lambda: WanTransformer3DModel(**transformer)),
            expand_timesteps="patch_size" in (vae or {}),
        )

    return build


WAN_22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def _cogvideox(transformer):
    def build(device, dtype):
        from diffusers import (
            AutoencoderKLCogVideoX,
            CogVideoXDPMScheduler,
            CogVideoXPipeline,
            CogVideoXTransformer3DModel,
        )

        config = {
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
            **transformer,
        }
        scheduler = CogVideoXDPMScheduler(
            prediction_type="v_prediction",
            snr_shift_scale=1.0,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
        return CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=on(device, dtype, lambda: AutoencoderKLCogVideoX(scaling_factor=0.7)),
            transformer=on(device, dtype, lambda: CogVideoXTransformer3DModel(**config)),
            scheduler=scheduler,
        )

    return build


def _hunyuan_video(device, dtype):
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=on(device, dtype, AutoencoderKLHunyuanVideo),
        transformer=on(device, dtype, HunyuanVideoTransformer3DModel),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _two_prompts(tokens, width=4096):
    def embeds(device, dtype):
        both = torch.randn(2, 1, tokens, width, device=device, dtype=dtype)
        return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}

    return embeds


def _hunyuan_prompt(device, dtype):
    mask = torch.zeros(1, 256, device=device, dtype=dtype)
    mask[:, :60] = 1  # a usual prompt; the rest is padding
    return {
        "prompt_embeds": torch.randn(1, 256, 4096, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, 768, device=device, dtype=dtype),
        "prompt_attention_mask": mask,
    }


def _umt5():
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=256384)
    )


def _t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128))


def _llama():
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, vocab_size=128320
        )
    )


_WAN_13B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_22_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_COGVIDEOX_15 = {"sample_width": 170, "sample_height": 96, "sample_frames": 81, "patch_size_t": 2, "patch_bias": False}
_GUIDED_BY_5, _GUIDED_BY_6 = {"guidance_scale": 5.0}, {"guidance_scale": 6.0}

_TINY_WAN = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "num_layers": 2, "text_dim": 16}
_TINY_VAE = {"base_dim": 8}

MODELS = {
    "wan2.1-1.3b-480p": Model(_wan(_WAN_13B), (480, 832, 81), _GUIDED_BY_5, _two_prompts(512), _umt5),
    "wan2.1-14b-480p": Model(_wan({}), (480, 832, 81), _GUIDED_BY_5, _two_prompts(512), _umt5),
    "wan2.1-14b-720p": Model(_wan({}), (720, 1280, 81), _GUIDED_BY_5, _two_prompts(512), _umt5),
    "wan2.2-5b-704p": Model(_wan(_WAN_22_5B, WAN_22_VAE), (704, 1280, 121), _GUIDED_BY_5, _two_prompts(512), _umt5),
    "cogvideox-5b-480p": Model(_cogvideox({}), (480, 720, 49), _GUIDED_BY_6, _two_prompts(226), _t5, 226),
    "cogvideox1.5-5b-768p": Model(
        _cogvideox(_COGVIDEOX_15), (768, 1360, 81), _GUIDED_BY_6, _two_prompts(226), _t5, 226, tiled=True
    ),
    "hunyuanvideo-720p": Model(
        _hunyuan_video, (720, 1280, 129), _GUIDED_BY_6, _hunyuan_prompt, _llama, 351, tiled=True
    ),
    # for a CPU: whether the program runs
    "smoke": Model(_wan(_TINY_WAN, _TINY_VAE), (64, 64, 9), _GUIDED_BY_5, _two_prompts(16, 16)),
}
