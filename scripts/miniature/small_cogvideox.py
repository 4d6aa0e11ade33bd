"""Write a small CogVideoX pipeline with random weights to a folder, for the scripts that take --model FOLDER.

    python -m scripts.miniature.small_cogvideox /tmp/small_cogvideox
    python -m scripts.benchmarks.levels --record /tmp/small_cogvideox --num_inference_steps 8 --guidance_scale 1

It makes no pictures, but is drawn so that it behaves like a trained model where it matters for attention: a token
attends to its neighbours in space and time and to what resembles it, so the softmax is peaked. What grows out of the
noise are coloured patches that move. Its 49 x 192 x 320 pixels make 12,480 video tokens.
"""

import math

import torch
from torch import nn

from .model import text_config
from .small_parts import TEXT_SIZES, TEXT_TOKENS, draw_direction, look_around, make_tokenizer, write_pipeline

HEADS, HEAD_DIM, LAYERS = 2, 64, 4
LATENT_CHANNELS = 8
WIDTH, HEIGHT, FRAMES = 320, 192, 49
BANDS = ((0.2, 0.5), (0.03, 0.12))
"""Radians a token by which the rotary embedding turns what the narrow and the wide head look for."""
CONTENT = 0.3
"""Size of what depends on the content in a query or key, beside a shared direction of size 1."""


def make_small_cogvideox(seed: int = 0):
    """The pipeline, float32; the global generator is left as it was."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer, vae = _transformer(), _vae()
        text_encoder = T5EncoderModel(text_config(T5Config, **TEXT_SIZES)).eval()
    # it predicts the clean video; trailing steps and a terminal SNR of zero, as CogVideoX has them
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="sample", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0
    )
    return CogVideoXPipeline(
        tokenizer=make_tokenizer(), text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


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
    # the noise comes in quietly, so that what attention gathers decides the output
    model.patch_embed.proj.weight.mul_(0.1)
    model.patch_embed.proj.bias.zero_()
    for block in model.transformer_blocks:
        _make_centre_surround(block)
    # no shift that all tokens share
    model.norm_out.linear.weight[: HEADS * HEAD_DIM], model.norm_out.linear.bias[: HEADS * HEAD_DIM] = 0, 0
    # one value for the four latents of a patch: no pattern of the size of a patch
    per_channel = torch.randn(LATENT_CHANNELS, model.proj_out.in_features) / math.sqrt(model.proj_out.in_features)
    model.proj_out.weight.copy_(per_channel.repeat_interleave(4, dim=0))
    model.proj_out.bias.zero_()
    return model


def _make_centre_surround(block: nn.Module) -> None:
    """Let a narrow head add what is near and a wide head take away what surrounds it: patterns instead of grey.

    All queries and keys of a head share a direction, which the rotary embedding turns into a preference for near
    tokens: on quick pairs of channels it falls off within a token or two, on slow pairs within ten.
    """
    attention = block.attn1
    width = HEADS * HEAD_DIM
    look_around(attention, CONTENT, (_preference(low, high) for low, high in BANDS))
    inward = torch.empty(HEAD_DIM, width)
    nn.init.orthogonal_(inward)
    attention.to_v.weight.copy_(torch.cat([inward, inward]))
    attention.to_out[0].weight.copy_(torch.cat([inward.T, -inward.T], 1))
    attention.to_v.bias.zero_()
    attention.to_out[0].bias.zero_()
    for norm in (block.norm1, block.norm2):
        # chunks: shift, scale, gate of video, the same of text; gates stand around one instead of zero
        norm.linear.weight[:width], norm.linear.bias[:width] = 0, 0
        norm.linear.bias[2 * width : 3 * width].add_(1.0)
        norm.linear.bias[5 * width :].add_(1.0)
    block.ff.net[2].weight.mul_(0.5)
    block.ff.net[2].bias.zero_()


def _preference(low: float, high: float) -> torch.Tensor:
    """Direction ``[HEAD_DIM]`` on the channels that the rotary embedding turns by `low` to `high` radians a token.

    Frames, rows and columns get the same share, so that what is near is round.
    """
    direction = draw_direction(low, high, (HEAD_DIM // 4, HEAD_DIM // 8 * 3, HEAD_DIM // 8 * 3))  # as CogVideoX divides
    direction -= direction.mean()
    return direction * math.sqrt(HEAD_DIM) / direction.norm()


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
    # colours around grey that use most of the range [-1, 1]
    sample = model.decode(torch.randn(1, LATENT_CHANNELS, 3, 6, 8)).sample.transpose(0, 1).flatten(1)
    out = model.decoder.conv_out.conv
    gain = 0.5 / sample.std(1)
    out.weight.mul_(gain[:, None, None, None, None])
    out.bias.sub_(sample.mean(1)).mul_(gain)
    return model


if __name__ == "__main__":
    write_pipeline(__doc__, make_small_cogvideox)
