"""Small real diffusers pipelines with seeded random weights. Nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
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
)
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
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


def cogvideox(pipeline_class: type = CogVideoXPipeline, model: Any = None, **transformer: Any) -> Any:
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
            transformer=model or cogvideox_transformer(**transformer),
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def wan_transformer(
    *, kind: str = "WanTransformer3DModel", heads: int = 2, head_dim: int = 16, layers: int = 2, in_channels: int = 16,
    seed: int = 0, **kwargs: Any,
) -> Any:  # fmt: skip
    return seeded(
        getattr(diffusers, kind),
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


def wan_vae() -> AutoencoderKLWan:
    return seeded(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def wan(
    pipeline_class: type | str = WanPipeline,
    *,
    experts: int = 1,
    multistep: bool = False,
    pipeline: dict[str, Any] | None = None,
    **transformer: Any,
) -> Any:
    if isinstance(pipeline_class, str):
        pipeline_class = getattr(diffusers, pipeline_class)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    if multistep or experts == 2:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = {"transformer_2": wan_transformer(**transformer, seed=1)} if experts == 2 else {}
    return _quiet(
        pipeline_class(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(UMT5Config, UMT5EncoderModel),
            vae=wan_vae(),
            transformer=wan_transformer(**transformer),
            scheduler=scheduler,
            **second,
            **(pipeline or {}),
        )
    )


def _image(height: int, width: int, frames: int) -> dict[str, Any]:
    return {"image": torch.linspace(0, 1, 3 * height * width).view(1, 3, height, width)}


def _video(height: int, width: int, frames: int) -> dict[str, Any]:
    video = torch.linspace(0, 1, frames * 3 * height * width).view(1, frames, 3, height, width)
    return {"video": video, "strength": 1.0, "num_frames": DROP}


def picture(height: int, width: int) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((width, height))


def _picture(height: int, width: int, frames: int) -> dict[str, Any]:
    return {"image": picture(height, width)}


def _wan_image(height: int, width: int, frames: int) -> dict[str, Any]:
    # upstream takes the last 512 context tokens for text when there are image tokens
    return {"image": picture(height, width), "max_sequence_length": 512}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_i2v(pipeline_class: type | str = WanImageToVideoPipeline, **transformer: Any) -> Any:
    """With keys and values for an image in its cross-attentions."""
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    processor = CLIPImageProcessor(size=8, crop_size=8)
    encoder = {"image_encoder": seeded(CLIPVisionModel, config), "image_processor": processor}
    shape = {"in_channels": 36, "out_channels": 16, "image_dim": 8, "added_kv_proj_dim": 32}
    return wan(pipeline_class, pipeline=encoder, **shape, **transformer)


def wan_animate(**transformer: Any) -> Any:
    return wan_i2v(
        "WanAnimatePipeline",
        kind="WanAnimateTransformer3DModel",
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        **transformer,
    )


def _pictures(height: int, width: int, frames: int) -> list[Image.Image]:
    return [picture(height, width).rotate(10 * frame) for frame in range(frames)]


def _wan_video(height: int, width: int, frames: int) -> dict[str, Any]:
    return {"video": _pictures(height, width, frames), "strength": 1.0, "num_frames": DROP}


def _animate(height: int, width: int, frames: int) -> dict[str, Any]:
    # the picture is the first frame of the grid
    frames -= 4
    poses, faces = _pictures(height, width, frames), _pictures(16, 16, frames)
    own = {"pose_video": poses, "face_video": faces, "segment_frame_length": frames, "num_frames": DROP}
    return {**_wan_image(height, width, frames), **own}


def embedded(prompts: Any, width: int, tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-ins for a text encoder's output ``[B, tokens, width]``, and the mask: a letter is a valid token."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    texts = [torch.randn(tokens, width, generator=torch.Generator().manual_seed(sum(p.encode()))) for p in prompts]
    mask = torch.stack([(torch.arange(tokens) < letters(p)).long() for p in prompts])
    return torch.stack(texts), mask


def letters(prompt: str) -> int:
    return min(len(prompt), TEXT_TOKENS)


# HunyuanVideo


def hunyuan_video_transformer(*, heads: int = 2, layers: int = 1, seed: int = 0, **kwargs: Any) -> Any:
    return seeded(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=kwargs.pop("in_channels", 4),
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        seed=seed,
        **kwargs,
    )


def hunyuan_video_vae() -> Any:
    return seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def hunyuan_video(
    pipeline: str = "HunyuanVideoPipeline", parts: dict[str, Any] | None = None, model: Any = None, **transformer: Any
) -> Any:
    without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return _quiet(
        getattr(diffusers, pipeline)(
            transformer=model or hunyuan_video_transformer(**transformer),
            vae=hunyuan_video_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            **without,
            **(parts or {}),
        )
    )


def hunyuan_video_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    """Embeddings instead of prompts; guidance by a second pass."""
    given = {"true_cfg_scale": asked["guidance_scale"], "guidance_scale": 1.0, "prompt": DROP}
    for prefix, prompts in (("", asked["prompt"]), ("negative_", asked["negative_prompt"])):
        embeds, mask = embedded(prompts, 16)
        given |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}
        given[f"{prefix}pooled_prompt_embeds"] = embeds[:, 0, :8]
    return {**given, "negative_prompt": DROP}


# LTX-Video


def ltx(pipeline: str = "LTXPipeline", **transformer: Any) -> Any:
    return _quiet(
        getattr(diffusers, pipeline)(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(),
            vae=seeded(
                diffusers.AutoencoderKLLTXVideo,
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1,) * 5,
                decoder_layers_per_block=(1,) * 5,
            ),
            transformer=seeded(
                diffusers.LTXVideoTransformer3DModel,
                **{
                    "in_channels": 8,
                    "out_channels": 8,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "cross_attention_dim": 32,
                    "num_layers": 2,
                    "caption_channels": 32,
                    **transformer,
                },
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def _ltx_keyframe(height: int, width: int, frames: int) -> dict[str, Any]:
    """A frame to begin with, in its place in the grid, and one for later, as tokens in front of the grid."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    return {"conditions": [LTXVideoCondition(image=picture(height, width), frame_index=index) for index in (0, 8)]}


# Mochi


def mochi(**transformer: Any) -> Any:
    return _quiet(
        diffusers.MochiPipeline(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(),
            vae=None,
            transformer=seeded(
                diffusers.MochiTransformer3DModel,
                **{
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "num_layers": 2,
                    "pooled_projection_dim": 32,
                    "in_channels": 4,
                    "text_embed_dim": 32,
                    "time_embed_dim": 8,
                    "max_sequence_length": TEXT_TOKENS,
                    **transformer,
                },
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        )
    )


# HunyuanVideo 1.5


def hunyuan_video15(
    pipeline: str = "HunyuanVideo15Pipeline", parts: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    transformer = seeded(
        diffusers.HunyuanVideo15Transformer3DModel,
        **{
            "in_channels": 2 * 4 + 1,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 16,
            "image_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6),
            **kwargs,
        },
    )
    vae = seeded(
        diffusers.AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
    )
    without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = getattr(diffusers, pipeline)(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        **without,
        **(parts or {}),
    )
    pipe.vision_num_semantic_tokens = 8
    return _quiet(pipe)


def _hunyuan_video15_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    given = dict.fromkeys(("prompt", "negative_prompt", "guidance_scale", "max_sequence_length"), DROP)
    for prefix in ("", "negative_"):
        embeds, mask = embedded(asked[f"{prefix}prompt"], 16)
        given |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
        # glyphs: the first two of five tokens are valid
        given[f"{prefix}prompt_embeds_2"] = embeds[:, :5]
        given[f"{prefix}prompt_embeds_mask_2"] = (torch.arange(5) < 2).long().repeat(len(embeds), 1)
    return given


def _set_guider(pipe: Any, asked: dict[str, Any]) -> None:
    pipe.guider.guidance_scale = asked["guidance_scale"]


def _hunyuan_video15_picture(pipe: Any, asked: dict[str, Any]) -> None:
    """The pipeline makes videos of the area that its checkpoint was trained for."""
    pipe.target_size = (asked["height"] * asked["width"]) ** 0.5
    _set_guider(pipe, asked)


def siglip() -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    processor = SiglipImageProcessor(size={"height": 8, "width": 8})
    return {"image_encoder": seeded(SiglipVisionModel, config), "feature_extractor": processor}


# Framepack


def framepack(**transformer: Any) -> Any:
    model = seeded(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
            **transformer,
        },
    )
    return hunyuan_video("HunyuanVideoFramepackPipeline", siglip(), model)


def _framepack_window(height: int, width: int, frames: int) -> dict[str, Any]:
    """A video of one window."""
    return {"image": picture(height, width), "latent_window_size": (frames + 3) // 4, "max_sequence_length": DROP}


def _framepack_history(height: int, width: int) -> int:
    """Two frames in full, two pooled by 2 and sixteen by 4 in all directions."""
    return 2 * height * width + -(-height // 2) * -(-width // 2) + 4 * -(-height // 4) * -(-width // 4)


# Motif-Video


def motif_video(pipeline: str = "MotifVideoPipeline", parts: dict[str, Any] | None = None, **transformer: Any) -> Any:
    return _quiet(
        getattr(diffusers, pipeline)(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=wan_vae(),
            text_encoder=None,
            tokenizer=None,
            transformer=seeded(
                diffusers.MotifVideoTransformer3DModel,
                **{
                    "in_channels": 33,
                    "out_channels": 16,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "text_embed_dim": 16,
                    "rope_axes_dim": (4, 6, 6),
                    "enable_text_cross_attention_dual": True,
                    **transformer,
                },
            ),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
            **(parts or {}),
        )
    )


def _motif_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    given = dict.fromkeys(("prompt", "negative_prompt", "guidance_scale"), DROP)
    for prefix in ("", "negative_"):
        embeds, mask = embedded(asked[f"{prefix}prompt"], 16)
        given |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}
    return given


# LTX-2


def ltx2(pipeline: str = "LTX2Pipeline", **transformer: Any) -> Any:
    small = {"connector_num_attention_heads": 2, "connector_attention_head_dim": 8, "connector_num_layers": 1}
    connectors = {f"{kind}_{name}": value for kind in ("video", "audio") for name, value in small.items()}
    registers = {f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")}
    return _quiet(
        getattr(diffusers, pipeline)(
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
            text_encoder=None,
            tokenizer=None,
            connectors=seeded(
                diffusers.pipelines.ltx2.LTX2TextConnectors,
                caption_channels=16,
                text_proj_in_factor=1,
                connector_rope_base_seq_len=4096,
                rope_theta=10000.0,
                rope_double_precision=True,
                causal_temporal_positioning=False,
                **connectors,
                **registers,
            ),
            transformer=seeded(
                diffusers.LTX2VideoTransformer3DModel,
                **{
                    "in_channels": 8,
                    "out_channels": 8,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "cross_attention_dim": 32,
                    "audio_in_channels": 8,
                    "audio_out_channels": 8,
                    "audio_num_attention_heads": 2,
                    "audio_attention_head_dim": 8,
                    "audio_cross_attention_dim": 16,
                    "num_layers": 2,
                    "caption_channels": 16,
                    **transformer,
                },
            ),
            vocoder=None,
        )
    )


def _ltx2_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    given = dict.fromkeys(("prompt", "negative_prompt"), DROP)
    for prefix in ("", "negative_"):
        embeds, mask = embedded(asked[f"{prefix}prompt"], 16)
        given |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}
    plain = {"stg_scale": 0.0, "modality_scale": 1.0, "spatio_temporal_guidance_blocks": None, "guidance_rescale": 0.0}
    sound = {f"audio_{name}": value for name, value in plain.items() if name != "spatio_temporal_guidance_blocks"}
    return {**given, **plain, **sound, "audio_guidance_scale": asked["guidance_scale"]}


def _ltx2_keyframe(height: int, width: int, frames: int) -> dict[str, Any]:
    """A frame to begin with, in its place in the grid, and one for later, as tokens behind the grid."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    # newer ones compress the picture with a package of its own unless told not to
    plain = {"crf": 0} if "crf" in inspect.signature(LTX2VideoCondition).parameters else {}
    frame = picture(height, width)
    return {"conditions": [LTX2VideoCondition(frames=frame, index=index, **plain) for index in (0, 1)]}


# Kandinsky 5


def kandinsky5(pipeline: str = "Kandinsky5T2VPipeline", **transformer: Any) -> Any:
    model = seeded(
        diffusers.Kandinsky5Transformer3DModel,
        **{
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            **transformer,
        },
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "modulation" in name:  # zeros at first, which would let no attention through
            weight.data.normal_(0, 0.2, generator=generator)
    without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return _quiet(
        getattr(diffusers, pipeline)(transformer=model, vae=hunyuan_video_vae(), scheduler=scheduler, **without)
    )


def _kandinsky5_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    given = dict.fromkeys(("prompt", "negative_prompt"), DROP)
    for prefix in ("", "negative_"):
        embeds, _ = embedded(asked[f"{prefix}prompt"], 16)
        given |= {f"{prefix}prompt_embeds_qwen": embeds, f"{prefix}prompt_embeds_clip": embeds[:, 0, :8]}
        given[f"{prefix}prompt_cu_seqlens"] = torch.arange(len(embeds) + 1, dtype=torch.int32) * embeds.shape[1]
    return given


# Cosmos


class Trusting:
    """Stands for the safety checker of Cosmos, which is a package of its own."""

    def to(self, device: Any) -> Trusting:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def cosmos(
    pipeline: str = "CosmosTextToWorldPipeline",
    vae: Any = None,
    scheduler: Any = None,
    parts: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    return _quiet(
        getattr(diffusers, pipeline)(
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            transformer=seeded(
                diffusers.CosmosTransformer3DModel,
                **{
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "num_layers": 2,
                    "text_embed_dim": 32,
                    "adaln_lora_dim": 4,
                    "max_size": (16, 32, 32),
                    "concat_padding_mask": False,
                    **kwargs,
                },
            ),
            vae=vae,
            scheduler=scheduler or diffusers.EDMEulerScheduler(sigma_schedule="karras", final_sigmas_type="sigma_min"),
            safety_checker=Trusting(),
            **(parts or {}),
        )
    )


def cosmos_vae() -> Any:
    return seeded(
        diffusers.AutoencoderKLCosmos,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    )


def cosmos2(pipeline: str, scheduler: Any, **kwargs: Any) -> Any:
    """Cosmos 2 and 2.5: the latents of Wan, and a mask of what is given."""
    return cosmos(pipeline, wan_vae(), scheduler, in_channels=17, out_channels=16, **kwargs)


def cosmos_transfer(**kwargs: Any) -> Any:
    image = {"img_context_dim_in": 8, "img_context_dim_out": 32}
    controlnet = seeded(
        diffusers.CosmosControlNetModel,
        n_controlnet_blocks=1,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(16, 32, 32),
        **image,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return cosmos2(
        "Cosmos2_5_TransferPipeline",
        scheduler,
        parts={"controlnet": controlnet},
        controlnet_block_every_n=2,
        img_context_num_tokens=4,
        **image,
        **kwargs,
    )


def _cosmos_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    given = dict.fromkeys(("prompt", "negative_prompt"), DROP)
    return given | {f"{prefix}prompt_embeds": embedded(asked[f"{prefix}prompt"], 32)[0] for prefix in ("", "negative_")}


# Allegro


def allegro(**transformer: Any) -> Any:
    return _quiet(
        diffusers.AllegroPipeline(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(),
            vae=None,
            transformer=seeded(
                diffusers.AllegroTransformer3DModel,
                **{
                    "num_attention_heads": 2,
                    "attention_head_dim": 24,
                    "num_layers": 2,
                    "cross_attention_dim": 48,
                    "caption_channels": 32,
                    **transformer,
                },
            ),
            scheduler=diffusers.EulerAncestralDiscreteScheduler(),
        )
    )


# EasyAnimate


def easyanimate(pipeline: str = "EasyAnimatePipeline", **transformer: Any) -> Any:
    return _quiet(
        getattr(diffusers, pipeline)(
            vae=seeded(
                diffusers.AutoencoderKLMagvit,
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                norm_num_groups=4,
            ),
            text_encoder=None,
            tokenizer=None,
            transformer=seeded(
                diffusers.EasyAnimateTransformer3DModel,
                **{
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "in_channels": 4,
                    "out_channels": 4,
                    "patch_size": 2,
                    "num_layers": 2,
                    "mmdit_layers": 1,
                    "time_embed_dim": 8,
                    "text_embed_dim": 16,
                    **transformer,
                },
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def easyanimate_control(**transformer: Any) -> Any:
    """diffusers 0.42.1 hands its `encode_prompt` an argument that it does not take."""
    pipe = easyanimate("EasyAnimateControlPipeline", in_channels=12, **transformer)
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda text_encoder_index=0, **kwargs: encode(**kwargs)
    return pipe


def _easyanimate_embeds(asked: dict[str, Any]) -> dict[str, Any]:
    return {**_motif_embeds(asked), "guidance_scale": asked["guidance_scale"], "max_sequence_length": DROP}


# ConsisID


def consisid(**transformer: Any) -> Any:
    model = seeded(
        diffusers.ConsisIDTransformer3DModel,
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 8,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": 32,
            "sample_height": 32,
            "sample_frames": 9,
            "max_text_seq_length": TEXT_TOKENS,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 8,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 2,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
            **transformer,
        },
    )
    # diffusers offers it where OpenCV is installed, which only draws the face that we do not need
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    return cogvideox(ConsisIDPipeline, model)


def _face(height: int, width: int, frames: int) -> dict[str, Any]:
    return {**_picture(height, width, frames), "id_vit_hidden": [torch.ones(1, 2, 8)], "id_cond": torch.ones(1, 8)}


# Helios


def helios(pipeline: str = "HeliosPipeline", *, stages: int = 1, **transformer: Any) -> Any:
    # with the published gamma of 1/3 the noise between stages has a covariance that a CPU finds singular
    edges = [stage / stages for stage in range(stages + 1)]
    return _quiet(
        getattr(diffusers, pipeline)(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(UMT5Config, UMT5EncoderModel),
            vae=wan_vae(),
            scheduler=diffusers.HeliosScheduler(stage_range=edges, stages=stages, gamma=0.3, use_flow_sigmas=True),
            transformer=seeded(
                diffusers.HeliosTransformer3DModel,
                **{
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "text_dim": 32,
                    "freq_dim": 32,
                    "ffn_dim": 32,
                    "num_layers": 2,
                    "rope_dim": (4, 6, 6),
                    "is_amplify_history": True,
                    **transformer,
                },
            ),
        )
    )


def _helios_chunk(height: int, width: int, frames: int) -> dict[str, Any]:
    """A video of one chunk."""
    return {"num_latent_frames_per_chunk": (frames + 3) // 4}


def _helios_stages(height: int, width: int, frames: int) -> dict[str, Any]:
    own = {"num_inference_steps": DROP, "pyramid_num_inference_steps_list": [2, 2]}
    return {**_helios_chunk(height, width, frames), **own}


# what there is


DROP = object()
"""Stands for an argument that a pipeline does not take."""


@dataclass(frozen=True)
class Case:
    """One kind of pipeline.

    Attributes:
        family: Name of its family.
        pipeline: Name of its class; diffusers versions without it skip the case.
        since: Version of diffusers in which it took the form of today, if it was another one first.
        build: Makes a fresh one; keyword arguments change its transformer.
        attentions: Regular expression of the paths of its video self-attentions: the family's, written a second time.
        layers: Their number in one forward.
        passes: Forwards of the denoiser in a step with guidance.
        text: Text tokens in the sequence of a self-attention, of any prompt.
        padded: How many tokens more than the prompt has letters come on top; None if the text is not padded.
        context: Other tokens (keyframes, history) that come on top, given height and width in tokens.
        grid: Its token grid for the default inputs.
        ragged: One that no block divides.
        extra: Inputs beyond those that all take, given height, width and frames in pixels.
        translate: Changes of the inputs that all take, given these.
        prepare: Called with the pipeline and the inputs that all take, before a call.
        latent_frames_per_token: Depth of a token.
        frames_per_latent: Frames of a latent but the first.
        token_pixels: Edge of a token.
        several: Whether it takes several prompts at once.
        has_float64: Whether its denoiser runs in float64; some round to float32 or less on the way.
    """

    family: str
    pipeline: str
    build: Callable[..., Any]
    attentions: str
    layers: int = 2
    passes: int = 1
    text: int = 0
    padded: int | None = None
    context: Callable[[int, int], int] = lambda height, width: 0
    grid: tuple[int, int, int] = GRID
    ragged: tuple[int, int, int] = (3, 7, 9)
    extra: Callable[[int, int, int], dict[str, Any]] = lambda height, width, frames: {}
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda asked: {}
    prepare: Callable[[Any, dict[str, Any]], None] = lambda pipe, asked: None
    latent_frames_per_token: int = 1
    frames_per_latent: int = 4
    token_pixels: int = 16
    several: bool = True
    has_float64: bool = True
    since: str = "0"

    def tokens(self, prompt: str = "a cat walks", grid: tuple[int, int, int] | None = None) -> int:
        """Tokens that self-attention reads."""
        frames, height, width = grid or self.grid
        text = self.text + (0 if self.padded is None else min(len(prompt) + self.padded, TEXT_TOKENS))
        return frames * height * width + self.context(height, width) + text

    def inputs(self, **kwargs: Any) -> dict[str, Any]:
        """Arguments of a call that gives latents, as `ask` takes them, or others of the pipeline's own."""
        names = inspect.signature(self.ask).parameters
        asked = self.ask(**{name: value for name, value in kwargs.items() if name in names})
        own = {name: value for name, value in kwargs.items() if name not in names}
        return {name: value for name, value in {**asked, **self.translate(asked), **own}.items() if value is not DROP}

    def ask(
        self,
        *,
        steps: int = 4,
        guidance: float = 3.0,
        grid: tuple[int, int, int] | None = None,
        seed: int = 0,
        prompt: str | list[str] = "a cat walks",
        negative_prompt: str | list[str] = "blurry",
    ) -> dict[str, Any]:
        """Return what all pipelines can be asked for, and what this one needs; `grid` in tokens."""
        frames, height, width = grid or self.grid
        frames = (frames * self.latent_frames_per_token - 1) * self.frames_per_latent + 1
        height, width = height * self.token_pixels, width * self.token_pixels
        asked = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "output_type": "latent",
            "max_sequence_length": TEXT_TOKENS,
            "height": height,
            "width": width,
            "num_frames": frames,
        }
        return asked | self.extra(height, width, frames)

    def run(self, pipe: Any, **kwargs: Any) -> torch.Tensor:
        """Latents of one call; arguments as `inputs` takes them."""
        names = inspect.signature(self.ask).parameters
        self.prepare(pipe, self.ask(**{name: value for name, value in kwargs.items() if name in names}))
        return pipe(**self.inputs(**kwargs)).frames


COGVIDEOX = {"family": "CogVideoX", "attentions": r"transformer_blocks\.\d+\.attn1", "text": TEXT_TOKENS}
WAN = {"family": "Wan", "attentions": r"blocks\.\d+\.attn1", "passes": 2}
HUNYUAN_VIDEO = {
    "family": "HunyuanVideo",
    "attentions": r"(single_)?transformer_blocks\.\d+\.attn",
    "passes": 2,
    "padded": 0,
    "translate": hunyuan_video_embeds,
}
LTX = {
    "family": "LTX-Video",
    "attentions": r"transformer_blocks\.\d+\.attn1",
    "frames_per_latent": 8,
    "token_pixels": 32,
}
_BASIC = {
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
        build=lambda **kw: cogvideox(CogVideoXImageToVideoPipeline, in_channels=8, **kw),
        extra=_image,
        several=False,
        **COGVIDEOX,
    ),
    "cogvideox-v2v": Case(
        pipeline="CogVideoXVideoToVideoPipeline",
        build=lambda **kw: cogvideox(CogVideoXVideoToVideoPipeline, **kw),
        extra=_video,
        several=False,
        **COGVIDEOX,
    ),
    "wan2.1": Case(pipeline="WanPipeline", build=wan, **WAN),
    "wan2.1-i2v": Case(pipeline="WanImageToVideoPipeline", build=wan_i2v, extra=_wan_image, **WAN),
    "wan2.2-a14b": Case(
        pipeline="WanPipeline", build=lambda **kw: wan(experts=2, pipeline={"boundary_ratio": 0.875}, **kw), **WAN
    ),
    "wan2.2-5b": Case(
        pipeline="WanPipeline",
        build=lambda **kw: wan(in_channels=48, pipeline={"expand_timesteps": True}, **kw),
        **WAN,
    ),
}
_MORE = {
    "cogvideox-control": Case(
        pipeline="CogVideoXFunControlPipeline",
        build=lambda **kw: cogvideox(diffusers.CogVideoXFunControlPipeline, in_channels=8, **kw),
        extra=lambda height, width, frames: {"control_video": _pictures(height, width, frames), "num_frames": DROP},
        several=False,
        **COGVIDEOX,
    ),
    "hunyuan-video": Case(pipeline="HunyuanVideoPipeline", build=hunyuan_video, **HUNYUAN_VIDEO),
    "hunyuan-video-i2v": Case(
        pipeline="HunyuanVideoImageToVideoPipeline",
        build=lambda **kw: hunyuan_video(
            "HunyuanVideoImageToVideoPipeline", {"image_processor": None}, image_condition_type="token_replace", **kw
        ),
        extra=_picture,
        several=False,
        **HUNYUAN_VIDEO,
    ),
    "hunyuan-skyreels-i2v": Case(
        pipeline="HunyuanSkyreelsImageToVideoPipeline",
        build=lambda **kw: hunyuan_video("HunyuanSkyreelsImageToVideoPipeline", in_channels=8, **kw),
        extra=_picture,
        several=False,
        **HUNYUAN_VIDEO,
    ),
    "ltx": Case(pipeline="LTXPipeline", build=ltx, **LTX),
    "ltx-i2v": Case(
        pipeline="LTXImageToVideoPipeline",
        build=lambda **kw: ltx("LTXImageToVideoPipeline", **kw),
        extra=_picture,
        **LTX,
    ),
    "ltx-condition": Case(
        pipeline="LTXConditionPipeline",
        build=lambda **kw: ltx("LTXConditionPipeline", **kw),
        extra=_ltx_keyframe,
        context=lambda height, width: height * width,
        several=False,
        **LTX,
    ),
    "wan-v2v": Case(
        pipeline="WanVideoToVideoPipeline",
        build=lambda **kw: wan("WanVideoToVideoPipeline", **kw),
        extra=_wan_video,
        several=False,
        **WAN,
    ),
    "wan-flf": Case(
        pipeline="WanImageToVideoPipeline",
        build=lambda **kw: wan_i2v(pos_embed_seq_len=10, **kw),
        extra=lambda height, width, frames: {
            **_wan_image(height, width, frames),
            "last_image": picture(height, width).rotate(90),
        },
        several=False,
        **WAN,
    ),
    "lucy-edit": Case(
        pipeline="LucyEditPipeline",
        build=lambda **kw: wan("LucyEditPipeline", in_channels=32, out_channels=16, **kw),
        extra=lambda height, width, frames: {"video": _pictures(height, width, frames)},
        several=False,
        **WAN,
    ),
    "wan-vace": Case(
        pipeline="WanVACEPipeline",
        build=lambda **kw: wan(
            "WanVACEPipeline", kind="WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96, **kw
        ),
        several=False,
        **{**WAN, "family": "Wan VACE", "attentions": r"(vace_)?blocks\.\d+\.attn1", "layers": 3},
    ),
    "wan-vace-references": Case(
        pipeline="WanVACEPipeline",
        build=lambda **kw: wan(
            "WanVACEPipeline", kind="WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=96, **kw
        ),
        # the reference is a frame of the grid
        extra=lambda height, width, frames: {
            "num_frames": frames - 4,
            "video": _pictures(height, width, frames - 4),
            "reference_images": [picture(height, width)],
        },
        several=False,
        **{**WAN, "family": "Wan VACE", "attentions": r"(vace_)?blocks\.\d+\.attn1", "layers": 4},
    ),
    "wan-animate": Case(
        pipeline="WanAnimatePipeline",
        build=wan_animate,
        extra=_animate,
        several=False,
        **{**WAN, "family": "Wan Animate"},
    ),
    "chronoedit": Case(
        pipeline="ChronoEditPipeline",
        build=lambda **kw: wan_i2v("ChronoEditPipeline", kind="ChronoEditTransformer3DModel", multistep=True, **kw),
        # without these it makes two frames
        extra=lambda height, width, frames: {
            **_wan_image(height, width, frames),
            "enable_temporal_reasoning": True,
            "num_temporal_reasoning_steps": 9,
        },
        several=False,
        **{**WAN, "family": "ChronoEdit"},
    ),
    "skyreels": Case(
        pipeline="SkyReelsV2Pipeline",
        build=lambda **kw: wan("SkyReelsV2Pipeline", kind="SkyReelsV2Transformer3DModel", **kw),
        **{**WAN, "family": "SkyReels-V2"},
    ),
    "skyreels-i2v": Case(
        pipeline="SkyReelsV2ImageToVideoPipeline",
        build=lambda **kw: wan_i2v("SkyReelsV2ImageToVideoPipeline", kind="SkyReelsV2Transformer3DModel", **kw),
        extra=_wan_image,
        several=False,
        **{**WAN, "family": "SkyReels-V2"},
    ),
    "skyreels-forcing": Case(
        pipeline="SkyReelsV2DiffusionForcingPipeline",
        build=lambda **kw: wan(
            "SkyReelsV2DiffusionForcingPipeline",
            kind="SkyReelsV2Transformer3DModel",
            multistep=True,
            **kw,
        ),
        **{**WAN, "family": "SkyReels-V2"},
    ),
    "mochi": Case(
        family="Mochi",
        pipeline="MochiPipeline",
        build=mochi,
        attentions=r"transformer_blocks\.\d+\.attn1",
        padded=2,
        frames_per_latent=6,
    ),
    "hunyuan-video-1.5": Case(
        family="HunyuanVideo 1.5",
        pipeline="HunyuanVideo15Pipeline",
        build=hunyuan_video15,
        attentions=r"transformer_blocks\.\d+\.attn",
        passes=2,
        text=2,
        padded=0,
        translate=_hunyuan_video15_embeds,
        prepare=_set_guider,
    ),
    "hunyuan-video-1.5-i2v": Case(
        family="HunyuanVideo 1.5",
        pipeline="HunyuanVideo15ImageToVideoPipeline",
        build=lambda **kw: hunyuan_video15("HunyuanVideo15ImageToVideoPipeline", siglip(), **kw),
        attentions=r"transformer_blocks\.\d+\.attn",
        passes=2,
        text=2 + 4,
        padded=0,
        extra=lambda height, width, frames: _picture(height - 1, width, frames),
        translate=lambda asked: {**_hunyuan_video15_embeds(asked), "height": DROP, "width": DROP},
        prepare=_hunyuan_video15_picture,
        several=False,
    ),
    "framepack": Case(
        family="Framepack",
        pipeline="HunyuanVideoFramepackPipeline",
        build=framepack,
        attentions=r"(single_)?transformer_blocks\.\d+\.attn",
        passes=2,
        text=4,
        padded=0,
        context=_framepack_history,
        extra=_framepack_window,
        translate=lambda asked: {**hunyuan_video_embeds(asked), "output_type": "pt"},
        several=False,
    ),
    "helios": Case(
        family="Helios",
        pipeline="HeliosPipeline",
        build=helios,
        attentions=r"blocks\.\d+\.attn1",
        passes=2,
        context=_framepack_history,
        extra=_helios_chunk,
        translate=lambda asked: {"output_type": "pt"},
        several=False,
    ),
    "motif-video": Case(
        family="Motif-Video",
        pipeline="MotifVideoPipeline",
        build=motif_video,
        attentions=r"(single_)?transformer_blocks\.\d+\.attn",
        passes=2,
        padded=0,
        translate=_motif_embeds,
        prepare=_set_guider,
        has_float64=False,
    ),
    "ltx2": Case(
        family="LTX-2",
        pipeline="LTX2Pipeline",
        since="0.38.0",
        build=ltx2,
        attentions=r"transformer_blocks\.\d+\.attn1",
        translate=_ltx2_embeds,
        frames_per_latent=8,
        token_pixels=32,
    ),
    "ltx2.3-condition": Case(
        family="LTX-2",
        pipeline="LTX2ConditionPipeline",
        since="0.41.0",
        build=lambda **kw: ltx2("LTX2ConditionPipeline", gated_attn=True, perturbed_attn=True, rope_type="split", **kw),
        attentions=r"transformer_blocks\.\d+\.attn1",
        context=lambda height, width: height * width,
        extra=_ltx2_keyframe,
        translate=_ltx2_embeds,
        frames_per_latent=8,
        token_pixels=32,
        several=False,
    ),
    "kandinsky5": Case(
        family="Kandinsky 5",
        pipeline="Kandinsky5T2VPipeline",
        build=kandinsky5,
        attentions=r"visual_transformer_blocks\.\d+\.self_attention",
        passes=2,
        translate=_kandinsky5_embeds,
        has_float64=False,
    ),
    "kandinsky5-i2v": Case(
        family="Kandinsky 5",
        pipeline="Kandinsky5I2VPipeline",
        build=lambda **kw: kandinsky5("Kandinsky5I2VPipeline", visual_cond=True, **kw),
        # the first four frames are matched to those that follow
        grid=(6, 6, 7),
        ragged=(6, 5, 7),
        attentions=r"visual_transformer_blocks\.\d+\.self_attention",
        passes=2,
        extra=_picture,
        translate=_kandinsky5_embeds,
        several=False,
        has_float64=False,
    ),
    "cosmos1": Case(
        family="Cosmos",
        pipeline="CosmosTextToWorldPipeline",
        build=cosmos,
        attentions=r"transformer_blocks\.\d+\.attn1",
        passes=2,
        frames_per_latent=8,
        has_float64=False,
    ),
    "allegro": Case(
        family="Allegro", pipeline="AllegroPipeline", build=allegro, attentions=r"transformer_blocks\.\d+\.attn1"
    ),
    "easyanimate": Case(
        family="EasyAnimate",
        pipeline="EasyAnimatePipeline",
        build=easyanimate,
        attentions=r"transformer_blocks\.\d+\.attn1",
        text=20,
        translate=_easyanimate_embeds,
    ),
    "consisid": Case(
        family="ConsisID",
        pipeline="ConsisIDPipeline",
        build=consisid,
        attentions=r"transformer_blocks\.\d+\.attn1",
        text=TEXT_TOKENS,
        extra=_face,
        several=False,
    ),
}

SKYREELS = {**WAN, "family": "SkyReels-V2", "several": False}
COSMOS = {
    "family": "Cosmos",
    "attentions": r"transformer_blocks\.\d+\.attn1",
    "passes": 2,
    "several": False,
    "has_float64": False,
}
EASYANIMATE = {
    "family": "EasyAnimate",
    "attentions": r"transformer_blocks\.\d+\.attn1",
    "text": 20,
    "translate": _easyanimate_embeds,
    "several": False,
}
LTX2 = {
    "family": "LTX-2",
    "attentions": r"transformer_blocks\.\d+\.attn1",
    "translate": _ltx2_embeds,
    "frames_per_latent": 8,
    "token_pixels": 32,
    "several": False,
}


def _ramp(height: int, width: int, frames: int) -> torch.Tensor:
    return torch.linspace(0, 1, 3 * frames * height * width).view(1, 3, frames, height, width)


_OTHER = {
    "skyreels-forcing-i2v": Case(
        pipeline="SkyReelsV2DiffusionForcingImageToVideoPipeline",
        build=lambda **kw: wan(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            kind="SkyReelsV2Transformer3DModel",
            multistep=True,
            **kw,
        ),
        extra=_picture,
        **SKYREELS,
    ),
    "skyreels-forcing-v2v": Case(
        pipeline="SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        build=lambda **kw: wan(
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            kind="SkyReelsV2Transformer3DModel",
            multistep=True,
            **kw,
        ),
        # goes on from the last two latent frames of nine frames
        extra=lambda height, width, frames: {
            "video": _pictures(height, width, 9),
            "overlap_history": 5,
            "base_num_frames": frames,
            "num_frames": frames + 4,
        },
        **SKYREELS,
    ),
    "ltx-long": Case(
        pipeline="LTXI2VLongMultiPromptPipeline",
        build=lambda **kw: ltx("LTXI2VLongMultiPromptPipeline", **kw),
        **LTX,
    ),
    "ltx2-i2v": Case(
        pipeline="LTX2ImageToVideoPipeline",
        since="0.38.0",
        build=lambda **kw: ltx2("LTX2ImageToVideoPipeline", **kw),
        # newer ones compress the picture with a package of its own unless told not to
        extra=lambda height, width, frames: {
            **_picture(height, width, frames),
            **_known("LTX2ImageToVideoPipeline", image_crf=0),
        },
        **LTX2,
    ),
    "ltx2-context": Case(
        pipeline="LTX2InContextPipeline", build=lambda **kw: ltx2("LTX2InContextPipeline", **kw), **LTX2
    ),
    "ltx2-hdr": Case(
        pipeline="LTX2HDRPipeline",
        build=lambda **kw: ltx2("LTX2HDRPipeline", **kw),
        **{**LTX2, "translate": lambda asked: _known("LTX2HDRPipeline", **_ltx2_embeds(asked))},
    ),
    "motif-video-i2v": Case(
        family="Motif-Video",
        pipeline="MotifVideoImage2VideoPipeline",
        build=lambda **kw: motif_video(
            "MotifVideoImage2VideoPipeline", {"feature_extractor": siglip()["feature_extractor"]}, **kw
        ),
        attentions=r"(single_)?transformer_blocks\.\d+\.attn",
        passes=2,
        padded=0,
        extra=_picture,
        translate=lambda asked: {**_motif_embeds(asked), "prompt": None},
        prepare=_set_guider,
        several=False,
        has_float64=False,
    ),
    "easyanimate-control": Case(
        pipeline="EasyAnimateControlPipeline",
        build=easyanimate_control,
        extra=lambda height, width, frames: {"control_video": _ramp(height, width, frames)},
        **EASYANIMATE,
    ),
    "easyanimate-inpaint": Case(
        pipeline="EasyAnimateInpaintPipeline",
        build=lambda **kw: easyanimate("EasyAnimateInpaintPipeline", in_channels=9, **kw),
        extra=lambda height, width, frames: {
            "video": _ramp(height, width, frames),
            "mask_video": 255 * torch.ones(1, 1, frames, height, width),
        },
        **EASYANIMATE,
    ),
    "cosmos1-v2w": Case(
        pipeline="CosmosVideoToWorldPipeline",
        build=lambda **kw: cosmos("CosmosVideoToWorldPipeline", cosmos_vae(), in_channels=5, **kw),
        extra=_picture,
        frames_per_latent=8,
        **COSMOS,
    ),
    "cosmos2": Case(
        pipeline="Cosmos2VideoToWorldPipeline",
        build=lambda **kw: cosmos2(
            "Cosmos2VideoToWorldPipeline", FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), **kw
        ),
        extra=_picture,
        **COSMOS,
    ),
    "cosmos2.5": Case(
        pipeline="Cosmos2_5_PredictBasePipeline",
        build=lambda **kw: cosmos2(
            "Cosmos2_5_PredictBasePipeline",
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            **kw,
        ),
        extra=lambda height, width, frames: {"video": _pictures(height, width, 5)},
        translate=_cosmos_embeds,
        **COSMOS,
    ),
    "cosmos2.5-transfer": Case(
        pipeline="Cosmos2_5_TransferPipeline",
        build=cosmos_transfer,
        extra=lambda height, width, frames: {
            "controls": _pictures(height, width, frames),
            "num_frames_per_chunk": frames,
        },
        translate=_cosmos_embeds,
        **COSMOS,
    ),
    "helios-pyramid": Case(
        family="Helios",
        pipeline="HeliosPyramidPipeline",
        build=lambda **kw: helios("HeliosPyramidPipeline", stages=2, **kw),
        attentions=r"blocks\.\d+\.attn1",
        passes=2,
        # the first stage has half the height and width
        grid=(3, 8, 8),
        context=_framepack_history,
        extra=_helios_stages,
        translate=lambda asked: {"output_type": "pt"},
        several=False,
    ),
}


def _known(pipeline: str, **given: Any) -> dict[str, Any]:
    """Those arguments that a pipeline takes, or that are to be dropped."""
    names = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    return {name: value for name, value in given.items() if name in names or value is DROP}


def _available(cases: dict[str, Case]) -> dict[str, Case]:
    version = Version(diffusers.__version__)
    return {
        name: case
        for name, case in cases.items()
        if hasattr(diffusers, case.pipeline) and version >= Version(case.since)
    }


CASES = _available(_BASIC)
"""CogVideoX and Wan, on which all the tests run that are not about families."""
ALL_CASES = _available(_BASIC | _MORE)
"""At least one of every family that this version of diffusers has: tests/test_families.py runs on all."""
OTHER_CASES = _available(_OTHER)
"""The other pipelines of these families, whose denoisers the battery knows already."""
MISSING = {name: case for name, case in (_BASIC | _MORE).items() if name not in ALL_CASES}
"""What this version of diffusers does not have."""
