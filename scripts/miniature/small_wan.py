"""Write a small Wan pipeline with random weights to a folder, for the scripts that take --model FOLDER.

    python -m scripts.miniature.small_wan /tmp/small_wan
    python -m scripts.benchmarks.levels --record /tmp/small_wan --width 512 --height 384 --num_frames 33

Random weights attend to everything alike, which says nothing about sparse attention. These look for what is near and
for what resembles a token: all queries and keys of a head share a direction, which the rotary embedding turns into a
preference for near tokens (each head has a width of its own), and the rest of a query or key depends on its content.
"""

import math

import torch
from torch import nn

from .model import text_config
from .small_parts import TEXT_SIZES, draw_direction, look_around, make_tokenizer, write_pipeline

HEADS, HEAD_DIM, LAYERS = 4, 64, 4
CONTENT = 0.7  # size of what depends on the content, beside a shared direction of size 1
BANDS = ((0.2, 0.5), (0.1, 0.3), (0.05, 0.2), (0.03, 0.12))  # radians a token that the direction of a head turns by


def make_small_wan(seed: int = 0):
    """The pipeline, float32; the global generator is left as it was."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            freq_dim=64,
            ffn_dim=256,
            num_layers=LAYERS,
            cross_attn_norm=True,
            rope_max_seq_len=1024,
        ).eval()
        for block in transformer.blocks:
            _open(block)
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval()
        text_encoder = UMT5EncoderModel(text_config(UMT5Config, **TEXT_SIZES)).eval()
    return WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def _open(block: nn.Module) -> None:
    """Shared directions and content in queries and keys; a gate that lets attention into the residual stream."""
    look_around(block.attn1, CONTENT, (_direction(*band) for band in BANDS))
    block.scale_shift_table[:, 2] += 1.0


def _direction(low: float, high: float) -> torch.Tensor:
    """Direction ``[HEAD_DIM]`` of mean square 1, on channels that turn by `low` to `high` radians a token."""
    side = 2 * (HEAD_DIM // 6)  # as Wan divides a head: the rest for frames, this for rows and for columns
    direction = draw_direction(low, high, (HEAD_DIM - 2 * side, side, side))
    return direction * math.sqrt(HEAD_DIM) / direction.norm()


if __name__ == "__main__":
    write_pipeline(__doc__, make_small_wan)
