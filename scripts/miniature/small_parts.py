"""What the small pipelines with random weights share: words, heads that look around, a command line.

Random weights attend to everything alike, which says nothing about sparse attention. Here all queries and keys of a
head share a direction, which the rotary embedding turns into a preference for near tokens.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model import finish_tokenizer

TEXT_TOKENS = 64
TEXT_SIZES = {"vocab_size": 1024, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
"""A text encoder as wide as the small denoisers expect it."""
PEAK = 20.0
"""Largest logit, that of a token which attends to itself."""


def make_tokenizer():
    """Pairs of letters are tokens. Nothing is trained, so ids are the same in every process and version."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz"
    singles = [(character, -6.0) for character in letters + "0123456789.,;:'!?-"]
    pairs = [(first + second, -9.0) for first in letters for second in letters]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    backend = Tokenizer(models.Unigram(special + singles + pairs, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return finish_tokenizer(backend, TEXT_TOKENS)


def look_around(attention: nn.Module, content: float, directions: Iterable[torch.Tensor]) -> None:
    """Draw queries and keys that look for what is near and for what resembles a token.

    Args:
        attention: A self-attention of diffusers with normalised queries and keys.
        content: Size of what depends on the content, beside a shared direction of size 1.
        directions: One ``[head_dim]`` a head, what all its queries and keys share; drawn after the contents.
    """
    width = attention.to_q.out_features
    head_dim = width // attention.heads
    for linear in (attention.to_q, attention.to_k):
        linear.weight.copy_(torch.randn(width, width) * content / math.sqrt(width))
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.fill_(math.sqrt(PEAK / math.sqrt(head_dim)))
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
    for head, direction in enumerate(directions):
        channels = slice(head * head_dim, (head + 1) * head_dim)
        attention.to_q.bias[channels] = attention.to_k.bias[channels] = direction


def draw_direction(low: float, high: float, sizes: tuple[int, ...]) -> torch.Tensor:
    """Unit vectors for frames, rows and columns, on the channels that turn by `low` to `high` radians a token."""
    parts = []
    for size in sizes:
        angle = 10000 ** (-torch.arange(0, size, 2) / size).repeat_interleave(2)
        chosen = torch.randn(size) * ((angle >= low) & (angle <= high))
        parts.append(nn.functional.normalize(chosen, dim=0))
    return torch.cat(parts)


def write_pipeline(description: str, make: Callable[[int], Any]) -> None:
    """The command line of the small pipelines: make one from a seed and save it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    pipe = make(args.seed)
    pipe.save_pretrained(args.folder)
    print(f"a small {type(pipe).__name__} is in {args.folder}")
