"""The miniature models: their sizes, and how each family encodes, noises and predicts.

Every part is a class of diffusers or transformers.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import world

TEXT_TOKENS = 32


@dataclass(frozen=True)
class Size:
    """How large a miniature is, and how it is trained.

    Attributes:
        heads: Attention heads, of `head_dim` channels each.
        head_dim: Channels of a head.
        layers: Blocks of the transformer.
        channels: Of the convolutions of the VAE.
        latents: Channels of the latents.
        pixels: Height and width of a clip; a token covers 8 x 8 pixels and 4 frames.
        frames: Of a clip.
        stages: What it is trained on: share of the time, pixels, clips a step.
        uses: Steps that a batch of clips serves, in the mean.
        pool: Batches to choose from.
        vae_batches: What the VAE is trained on in turn: pixels, frames, clips. At half the size too, as the first
            stage of the transformer sees it, and at full length: what a causal convolution knows of the past grows.
        text_steps: Of the text encoder by itself.
        learning_rate: Of the transformer and the text encoder, at its highest.
    """

    heads: int = 4
    head_dim: int = 64
    layers: int = 8
    channels: int = 24
    latents: int = 8
    pixels: int = 128
    frames: int = 49
    stages: tuple[tuple[float, int, int], ...] = ((0.6, 64, 48), (0.4, 128, 16))
    uses: int = 8
    pool: int = 32
    vae_batches: tuple[tuple[int, int, int], ...] = ((128, 17, 8), (64, 49, 11), (128, 49, 3))
    text_steps: int = 800
    learning_rate: float = 2e-3

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SIZES = {
    "miniature": Size(),  # as shipped
    "small": Size(
        layers=4,
        heads=2,
        channels=16,
        pixels=64,
        frames=25,
        stages=((1.0, 64, 16),),
        vae_batches=((64, 17, 4), (64, 25, 3)),
    ),
    "toy": Size(
        layers=1,
        heads=1,
        head_dim=32,
        channels=8,
        latents=4,
        pixels=32,
        frames=9,
        stages=((0.5, 16, 2), (0.5, 32, 2)),
        vae_batches=((32, 9, 1), (16, 9, 4)),
        text_steps=20,
    ),
}


def tokenizer() -> Any:
    """A word of the grammar is a token, anything else is unknown; nothing is trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *world.WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return finish_tokenizer(backend, TEXT_TOKENS)


def finish_tokenizer(backend: Any, length: int) -> Any:
    """Wrap a tokenizer whose first words are `<pad>`, `</s>` and `<unk>`: lower case, and the end marked."""
    from tokenizers import normalizers, processors
    from transformers import PreTrainedTokenizerFast

    backend.normalizer = normalizers.Lowercase()
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


TEXT_SIZES = {"vocab_size": 64, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}


def text_config(kind: type, **sizes: int) -> Any:
    """Return the configuration of a text encoder over these tokenizers: `T5Config` or `UMT5Config`."""
    return kind(
        **sizes, dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip


class CogVideoX:
    """Text and video in one sequence; predicts v on a schedule that ends in pure noise."""

    name = "cogvideox"
    pipeline = "CogVideoXPipeline"
    default_text_tokens = 226
    guidance_scale = 4.0

    def vae(self, size: Size) -> nn.Module:
        from diffusers import AutoencoderKLCogVideoX

        return AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(size.channels,) * 3,
            latent_channels=size.latents,
            layers_per_block=0,
            norm_num_groups=4,
            temporal_compression_ratio=4,
            sample_height=size.pixels,
            sample_width=size.pixels,
            scaling_factor=1.0,
        )

    def set_statistics(self, vae: nn.Module, latents: Tensor) -> None:
        """Make latents have unit size from now on: ``[B, C, F, H, W]`` of many clips as the VAE gives them."""
        vae.register_to_config(scaling_factor=float(1 / latents.square().mean().sqrt()))

    def transformer(self, size: Size) -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            in_channels=size.latents,
            out_channels=size.latents,
            time_embed_dim=64,
            text_embed_dim=128,
            num_layers=size.layers,
            sample_width=size.pixels // 4,
            sample_height=size.pixels // 4,
            sample_frames=size.frames,
            patch_size=2,
            max_text_seq_length=TEXT_TOKENS,
            use_rotary_positional_embeddings=True,
        )

    def text_encoder(self) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        return T5EncoderModel(text_config(T5Config, **TEXT_SIZES))

    def scheduler(self) -> Any:
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,  # as CogVideoX-2b has it
            set_alpha_to_one=True,
        )

    def build(self, **parts: Any) -> Any:
        from diffusers import CogVideoXPipeline

        return CogVideoXPipeline(**parts)

    def latents(self, vae: nn.Module, video: Tensor) -> Tensor:
        """``[B, F, C, H, W]`` as the transformer takes them."""
        return vae.encode(video).latent_dist.mode().transpose(1, 2) * vae.config.scaling_factor

    def noised(self, pipe: Any, clean: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noised latents, timesteps ``[B]``, and what the transformer should predict."""
        timesteps = (1000 * _noise_shares(clean, generator)).long()
        signal, rest = self.coefficients(pipe, timesteps, clean)
        return signal * clean + rest * noise, timesteps, signal * noise - rest * clean

    def coefficients(self, pipe: Any, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What clean latents and noise are multiplied by at each timestep ``[B]``."""
        alphas = pipe.scheduler.alphas_cumprod.to(like.device, like.dtype)[timesteps].view(-1, *[1] * (like.ndim - 1))
        return alphas.sqrt(), (1 - alphas).sqrt()

    def text(self, text_encoder: nn.Module, ids: Tensor) -> Tensor:
        """Embeddings of padded prompts as the pipeline computes them."""
        return text_encoder(ids)[0]

    def extras(self, pipe: Any, latents: Tensor) -> dict[str, Any]:
        """What the transformer is given besides latents, time and text."""
        frames, _, height, width = latents.shape[1:]
        rotary = pipe._prepare_rotary_positional_embeddings(height * 4, width * 4, frames, latents.device)
        return {"image_rotary_emb": rotary}


class Wan:
    """Text by cross-attention; predicts the velocity from clean latents to noise."""

    name = "wan"
    pipeline = "WanPipeline"
    default_text_tokens = 512
    guidance_scale = 4.0
    shift = 3.0

    def vae(self, size: Size) -> nn.Module:
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan(
            # wider than its sibling: torch runs narrow convolutions over a few frames on a slow path of the CPU
            base_dim=size.channels + 8,
            z_dim=size.latents,
            dim_mult=[1, 1, 1],
            num_res_blocks=0,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * size.latents,
            latents_std=[1.0] * size.latents,
            scale_factor_spatial=4,
        )

    def set_statistics(self, vae: nn.Module, latents: Tensor) -> None:
        """Make latents have mean 0 and deviation 1 from now on: ``[B, C, F, H, W]`` as the VAE gives them."""
        channels = latents.transpose(0, 1).flatten(1)
        vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())

    def transformer(self, size: Size) -> nn.Module:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            in_channels=size.latents,
            out_channels=size.latents,
            text_dim=128,
            freq_dim=64,
            ffn_dim=size.width * 3,
            num_layers=size.layers,
        )

    def text_encoder(self) -> nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        return UMT5EncoderModel(text_config(UMT5Config, **TEXT_SIZES))

    def scheduler(self) -> Any:
        from diffusers import UniPCMultistepScheduler

        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift, num_train_timesteps=1000
        )

    def build(self, **parts: Any) -> Any:
        from diffusers import WanPipeline

        return WanPipeline(**parts)

    def latents(self, vae: nn.Module, video: Tensor) -> Tensor:
        """``[B, C, F, H, W]`` as the transformer takes them."""
        mean, std = (
            torch.tensor(values, device=video.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (vae.encode(video).latent_dist.mode() - mean) / std

    def noised(self, pipe: Any, clean: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noised latents, timesteps ``[B]``, and what the transformer should predict."""
        share = _noise_shares(clean, generator)
        share = self.shift * share / (1 + (self.shift - 1) * share)
        level = share.view(-1, *[1] * (clean.ndim - 1))
        return torch.lerp(clean, noise, level), share * 1000, noise - clean

    def text(self, text_encoder: nn.Module, ids: Tensor) -> Tensor:
        """Embeddings of padded prompts as the pipeline computes them: zero where nothing stands."""
        mask = ids != 0
        return text_encoder(ids, mask.long()).last_hidden_state * mask[..., None]

    def extras(self, pipe: Any, latents: Tensor) -> dict[str, Any]:
        """What the transformer is given besides latents, time and text."""
        return {}


def _noise_shares(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Draw how far along its schedule each clip is noised, in [0, 1): every second one in the last fifth.

    A clip has a hundred thousand numbers, so a ten-thousandth of signal shows what moves where. Which thing gets which
    colour, shape and way is decided before that: in a few hundredths of the schedule, where a uniform draw seldom gets.
    """
    share = torch.rand(len(clean), generator=generator, device=clean.device)
    late = torch.rand(len(clean), generator=generator, device=clean.device) < 0.5
    return torch.where(late, 0.8 + 0.2 * share, share)


FAMILIES = {family.name: family for family in (CogVideoX(), Wan())}


def build_pipeline(family: Any, size: Size, vae: nn.Module | None = None) -> Any:
    """Make a pipeline with weights of the global random generator, in float32."""
    return family.build(
        tokenizer=tokenizer(),
        text_encoder=family.text_encoder(),
        vae=family.vae(size) if vae is None else vae,
        transformer=family.transformer(size),
        scheduler=family.scheduler(),
    )


def is_matrix(name: str, weight: Tensor) -> bool:
    """Whether a weight of the `Denoiser` multiplies activations inside a block, by its name."""
    return weight.ndim == 2 and "block" in name and "norm" not in name and "relative" not in name


def token_ids(prompts: list[str], length: int, words: Any) -> Tensor:
    """Token ids ``[B, length]`` of prompts, padded."""
    return words(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def facts(scenes: list[world.Scene], length: int) -> tuple[Tensor, Tensor]:
    """What each token's phrase says.

    Returns:
        ``[B, length, len(FACTS)]``, 1 where a fact is stated by the phrase that the token stands in, else 0; and
        ``[B, length]``, whether there is a word at all.
    """
    stated, words = torch.zeros(len(scenes), length, len(world.FACTS)), torch.zeros(len(scenes), length)
    for row, scene in enumerate(scenes):
        start = 0
        for phrase, facts_ in scene.phrases:
            end = start + len(re.findall(r"\w+|,", phrase))
            stated[row, start:end, [world.FACTS.index(fact) for fact in facts_]] = 1
            words[row, start:end] = 1
            start = end
    return stated, words


class AutoEncoder(nn.Module):
    """A VAE, there and back in one forward, as data-parallel training wants it."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the restored video, the latents, and their mean divergence from noise."""
        latents = self.vae.encode(video).latent_dist
        mean, logvar = latents.mean.float(), latents.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return self.vae.decode(latents.sample()).sample, mean, divergence


class Denoiser(nn.Module):
    """Text encoder and transformer in one forward."""

    def __init__(self, family: Any, text_encoder: nn.Module, transformer: nn.Module) -> None:
        super().__init__()
        self.family, self.text_encoder, self.transformer = family, text_encoder, transformer

    def forward(self, ids: Tensor, noisy: Tensor, timesteps: Tensor, extras: dict[str, Any]) -> Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=self.family.text(self.text_encoder, ids),
            return_dict=False,
            **extras,
        )[0]
