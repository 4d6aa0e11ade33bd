"""The demo model: a small CogVideoX pipeline that needs no network, for `--model demo`, tests and first steps.

Its weights are random for now; a folder of trained ones takes their place without a change of code. Random weights make
no pictures, but their distribution is chosen so that the model behaves like one where it matters for attention: a token
attends to its neighbours in space and time and to what resembles it, so the softmax is peaked, as in trained models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import CogVideoXPipeline
    from transformers import PreTrainedTokenizerFast

__all__ = ["TRAINED_WEIGHTS", "build_demo_pipeline", "has_trained_weights"]

TRAINED_WEIGHTS = Path(__file__).parent / "weights" / "demo"
"""Where trained weights of the demo model stand once there are some: a folder as `save_pretrained` writes it."""

TEXT_TOKENS = 64
HEADS, HEAD_DIM, LAYERS = 2, 64, 6
LATENT_CHANNELS = 8
WIDTH, HEIGHT, FRAMES = 320, 192, 49
PEAK = 12.0
"""Logit of a token that attends to itself; tokens some steps away get a few units less."""


def has_trained_weights(folder: str | Path | None = None) -> bool:
    """Tell whether `build_demo_pipeline` would load trained weights."""
    return ((TRAINED_WEIGHTS if folder is None else Path(folder)) / "model_index.json").is_file()


def build_demo_pipeline(folder: str | Path | None = None, *, seed: int = 0) -> CogVideoXPipeline:
    """Make the demo pipeline: trained weights if there are some, random ones from a seed otherwise.

    The global random generator is left as it was.

    Args:
        folder: Folder of a saved pipeline to load. None takes `TRAINED_WEIGHTS` if it exists.
        seed: Seed of the random weights.

    Returns:
        The pipeline, float32, on the CPU. A token covers 8 x 8 pixels and 4 frames, so the default video of
        49 x 192 x 320 makes 13 x 24 x 40 = 12,480 video tokens.

    Raises:
        FileNotFoundError: If `folder` holds no pipeline.
    """
    if folder is not None and not has_trained_weights(folder):
        raise FileNotFoundError(f"no pipeline in {folder}: expected a folder with model_index.json, as save_pretrained writes it")
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    if has_trained_weights(folder):
        return CogVideoXPipeline.from_pretrained(folder or TRAINED_WEIGHTS)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer, vae, text_encoder = _transformer(), _vae(), _text_encoder()
    # it predicts the clean video; trailing steps and a terminal SNR of zero, as CogVideoX has them
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="sample", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0
    )
    return CogVideoXPipeline(
        tokenizer=_tokenizer(), text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Pairs of letters are tokens. Nothing is trained, so ids are the same in every process and version."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    singles = [(character, -6.0) for character in letters + "0123456789.,;:'!?-"]
    pairs = [(first + second, -9.0) for first in letters for second in letters]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    backend = Tokenizer(models.Unigram(special + singles + pairs, unk_id=2))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def _text_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=1024,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def _transformer() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=LAYERS,
        sample_width=WIDTH // 4,
        sample_height=HEIGHT // 4,
        sample_frames=FRAMES,
        patch_size=2,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    ).eval()
    model.patch_embed.proj.weight.mul_(0.3)
    for block in model.transformer_blocks:
        attention = block.attn1
        # a direction that all queries and keys share makes the rotary embedding a preference for near tokens
        shared = _local_direction() * math.sqrt(PEAK * math.sqrt(HEAD_DIM))
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.mul_(0.5)
            norm.bias.copy_(shared)
        for linear in (attention.to_v, attention.to_out[0]):
            nn.init.orthogonal_(linear.weight)
        width = attention.to_q.in_features
        for norm in (block.norm1, block.norm2):
            # chunks: shift, scale, gate of video, the same of text. Nothing that all tokens have in common is added to
            # the video, and gates stand around one instead of zero
            norm.linear.weight[:width], norm.linear.bias[:width] = 0, 0
            norm.linear.bias[2 * width : 3 * width].add_(1.0)
            norm.linear.bias[5 * width :].add_(1.0)
        for linear in (attention.to_v, attention.to_out[0], block.ff.net[0].proj, block.ff.net[2]):
            linear.bias.zero_()
    # one value for the four latents of a patch: no pattern of the size of a patch
    per_channel = torch.randn(LATENT_CHANNELS, model.proj_out.in_features) / math.sqrt(model.proj_out.in_features)
    model.proj_out.weight.copy_(per_channel.repeat_interleave(4, dim=0))
    model.proj_out.bias.zero_()
    return model


def _local_direction() -> torch.Tensor:
    """A unit vector on the quick pairs of the rotary embedding: its product with itself falls off within a few tokens."""
    direction = torch.randn(HEAD_DIM)
    start = 0
    for size in (HEAD_DIM // 4, HEAD_DIM // 8 * 3, HEAD_DIM // 8 * 3):  # frames, rows, columns
        pair = torch.arange(start, start + size) // 2 - start // 2
        direction[start : start + size] *= 10000 ** (-2 * pair / size) > 0.09
        start += size
    return nn.functional.normalize(direction, dim=0)


def _vae() -> nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    model = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=0,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        scaling_factor=1.0,
    ).eval()
    # convolutions that mix channels at random and blur in space: smooth colours instead of grain
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    blur = {2: row[:, None] * row, 3: (row[:, None] * row).expand(3, 3, 3) / 3}
    for module in model.decoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.kernel_size[-1] == 3:
            kernel = blur[len(module.kernel_size)]
            mix = torch.randn(module.out_channels, module.in_channels) / math.sqrt(module.in_channels)
            module.weight.copy_(mix[(...,) + (None,) * kernel.ndim] * kernel)
    model.decoder.conv_out.conv.weight.mul_(1.0)
    return model
