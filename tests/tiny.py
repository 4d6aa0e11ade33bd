"""Small real diffusers pipelines with seeded random weights. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

GRID = (3, 6, 7)
TEXT_TOKENS = 16
TINY_PRESET = {
    "block_size": {"m": 16, "n": 16, "tile_n": 16},
    "mask_ratios": {1: [0, 0.25], 2: [0.25, 0.5], 8: [0.5, 0.75], 0: [0.75, 1]},
    "mask_mode": "topk",
    "use_sim_mask": False,
    "warmup_steps": 0,
}
"""Overrides under which a few hundred tokens are many blocks at many factors, whatever the preset files say."""


def seeded(make: Callable[..., Any], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Build a module with weights that depend on `seed` alone, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args, **kwargs).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A character is a token; ids are the same in every process and version."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    backend = Tokenizer(
        models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], unk_id=2)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder(config_class: type = T5Config, model_class: type = T5EncoderModel) -> Any:
    config = config_class(
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return seeded(model_class, config)


def cogvideox_transformer(
    *, heads: int = 2, head_dim: int = 16, layers: int = 2, rotary: bool = True, patch_size_t: int | None = None,
    in_channels: int = 4, seed: int = 0,
) -> CogVideoXTransformer3DModel:  # fmt: skip
    return seeded(
        CogVideoXTransformer3DModel,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=layers,
        sample_width=32,
        sample_height=32,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_size_t,
        patch_bias=patch_size_t is None,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=rotary,
        seed=seed,
    )


def cogvideox(pipeline_class: type = CogVideoXPipeline, **transformer: Any) -> Any:
    vae = seeded(
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return _quiet(
        pipeline_class(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(),
            vae=vae,
            transformer=cogvideox_transformer(**transformer),
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def wan_transformer(
    *, heads: int = 2, head_dim: int = 16, layers: int = 2, in_channels: int = 16, seed: int = 0, **kwargs: Any
) -> WanTransformer3DModel:
    return seeded(
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=kwargs.pop("out_channels", in_channels),
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
        seed=seed,
        **kwargs,
    )


def wan(
    pipeline_class: type = WanPipeline, *, experts: int = 1, pipeline: dict[str, Any] | None = None, **transformer: Any
) -> Any:
    vae = seeded(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    if experts == 2:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _quiet(
        pipeline_class(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(UMT5Config, UMT5EncoderModel),
            vae=vae,
            transformer=wan_transformer(**transformer),
            transformer_2=wan_transformer(**transformer, seed=1) if experts == 2 else None,
            scheduler=scheduler,
            **(pipeline or {}),
        )
    )


@dataclass(frozen=True)
class Case:
    """One kind of pipeline.

    Attributes:
        build: Makes a fresh one; keyword arguments change its transformer.
        grid: Its token grid for the default inputs.
        text: Text tokens in the sequence of a self-attention.
        passes: Forwards of the denoiser in a step with guidance.
        extra: Inputs beyond those that all take, given height, width and frames in pixels.
        strength: Share of the asked steps that run (video to video).
    """

    build: Callable[..., Any]
    text: int
    passes: int
    grid: tuple[int, int, int] = GRID
    extra: Callable[[int, int, int], dict[str, Any]] = lambda height, width, frames: {}
    latent_frames_per_token: int = 1
    token_pixels: int = 16

    def inputs(
        self,
        *,
        steps: int = 4,
        guidance: float = 3.0,
        grid: tuple[int, int, int] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of a call that gives latents; `grid` in tokens."""
        frames, height, width = grid or self.grid
        frames = (frames * self.latent_frames_per_token - 1) * 4 + 1
        height, width = height * self.token_pixels, width * self.token_pixels
        size = {"height": height, "width": width, "num_frames": frames}
        return {
            "prompt": "a cat walks",
            "negative_prompt": "blurry",
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "output_type": "latent",
            "max_sequence_length": TEXT_TOKENS,
            **size,
            **self.extra(height, width, frames),
            **kwargs,
        }

    def run(self, pipe: Any, **kwargs: Any) -> torch.Tensor:
        """Latents of one call."""
        return pipe(**self.inputs(**kwargs)).frames


def _image(height: int, width: int, frames: int) -> dict[str, Any]:
    return {"image": torch.linspace(0, 1, 3 * height * width).view(1, 3, height, width)}


def _wan_image(height: int, width: int, frames: int) -> dict[str, Any]:
    # upstream takes the last 512 context tokens for text when there are image tokens
    return {"image": Image.linear_gradient("L").convert("RGB").resize((width, height)), "max_sequence_length": 512}


def wan_i2v(**transformer: Any) -> Any:
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    processor = CLIPImageProcessor(size=8, crop_size=8)
    encoder = {"image_encoder": seeded(CLIPVisionModel, config), "image_processor": processor}
    shape = {"in_channels": 36, "out_channels": 16, "image_dim": 8, "added_kv_proj_dim": 32}
    return wan(WanImageToVideoPipeline, pipeline=encoder, **shape, **transformer)


def _video(height: int, width: int, frames: int) -> dict[str, Any]:
    video = torch.linspace(0, 1, frames * 3 * height * width).view(1, frames, 3, height, width)
    return {"video": video, "strength": 1.0, "num_frames": _DROP}


_DROP = object()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _VideoCase(Case):
    def inputs(self, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in super().inputs(**kwargs).items() if value is not _DROP}


CASES = {
    "cogvideox": Case(cogvideox, TEXT_TOKENS, 1),
    "cogvideox-sincos": Case(lambda **kw: cogvideox(rotary=False, **kw), TEXT_TOKENS, 1),
    "cogvideox1.5": Case(
        lambda **kw: cogvideox(patch_size_t=2, **kw), TEXT_TOKENS, 1, grid=(2, 6, 7), latent_frames_per_token=2
    ),
    "cogvideox-i2v": Case(
        lambda **kw: cogvideox(CogVideoXImageToVideoPipeline, in_channels=8, **kw), TEXT_TOKENS, 1, extra=_image
    ),
    "cogvideox-v2v": _VideoCase(
        lambda **kw: cogvideox(CogVideoXVideoToVideoPipeline, **kw), TEXT_TOKENS, 1, extra=_video
    ),
    "wan2.1": Case(wan, 0, 2),
    "wan2.1-i2v": Case(wan_i2v, 0, 2, extra=_wan_image),
    "wan2.2-a14b": Case(lambda **kw: wan(experts=2, pipeline={"boundary_ratio": 0.875}, **kw), 0, 2),
    "wan2.2-5b": Case(lambda **kw: wan(in_channels=48, pipeline={"expand_timesteps": True}, **kw), 0, 2),
}  # fmt: skip
