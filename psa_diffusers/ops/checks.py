"""Refuses what the operation cannot take, with what was expected, what came and what to do."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from psa_diffusers.ops.types import Factors

LARGEST_SCALE = 1e18  # float32 holds its square
_INTEGERS = (Integral, torch.SymInt)
LARGEST_BLOCK = 2**20  # tokens; more than any video has, and a block's lanes take memory


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors that do not fit each other, and dtypes and head dimensions that no backend takes."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} must be a tensor [B, H, L, D], got a {type(x).__name__}: torch.as_tensor makes one"
            )
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "self-attention needs q, k and v of one shape [B, H, L, D], got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise TypeError(
            "q, k and v must have one dtype and one device, got "
            + ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in zip("qkv", (q, k, v), strict=True))
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"q, k and v must be float32, float16, bfloat16 or float64, got {q.dtype}: cast them first")
    if unsupported := unsupported_head_dim(q.shape[-1]):
        raise ValueError(unsupported)
    if 0 in q.shape:
        raise ValueError(f"q, k and v must not be empty, got shape {tuple(q.shape)}")


def unsupported_head_dim(dim: int) -> str | None:
    """Why a head dimension cannot run, or None if it can."""
    if dim % 8 or not 16 <= dim <= 256:
        return f"the head dimension must be a multiple of 8 from 16 to 256, got {dim}: pad q, k and v with zeros"
    return None


def checked_grid(q: Tensor, grid: tuple[int, int, int] | None, text_tokens: int) -> tuple[int, int, int]:
    """The grid as plain integers, all video tokens in one line if there is none; refuses one that does not fit."""
    is_row = isinstance(grid, Iterable) and getattr(grid, "ndim", 1) == 1
    given: tuple[Any, ...] = () if grid is None else tuple(grid) if is_row else (grid,)
    for name, sizes in (("text_tokens", (text_tokens,)), ("grid", given)):
        if any(isinstance(size, bool) or not isinstance(size, _INTEGERS) for size in sizes):
            expected = "an integer" if name == "text_tokens" else "(frames, height, width), three integers"
            got = repr(text_tokens if name == "text_tokens" else grid)
            raise TypeError(f"{name} must be {expected}, counted in tokens, got {got}")
    sizes = (1, 1, q.shape[2] - text_tokens) if grid is None else tuple(int(size) for size in given)
    if len(sizes) != 3 or min(sizes) < 1 or text_tokens < 0:
        raise ValueError(
            "grid must be (frames, height, width) in tokens, each at least 1, and text_tokens at least 0, "
            f"got {sizes} and {text_tokens}"
        )
    frames, height, width = sizes
    if frames * height * width + text_tokens != q.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} tokens, but the grid {frames} x {height} x {width} and {text_tokens} text tokens make "
            f"{frames * height * width + text_tokens}: pass the grid in tokens (after patching), and text_tokens"
        )
    return frames, height, width


def checked_scale(scale: SupportsFloat | None, dim: int) -> float:
    """The softmax scale, ``1 / sqrt(D)`` for None; refuses what is no number, and one whose square is out of range."""
    if scale is None:
        return 1 / math.sqrt(dim)
    if isinstance(scale, (bool, str, bytes)) or not isinstance(scale, SupportsFloat):
        raise TypeError(f"scale must be a number, got a {type(scale).__name__}: leave it out for 1 / sqrt(D)")
    number = float(scale)
    if not abs(number) <= LARGEST_SCALE:
        raise ValueError(
            f"scale must be a finite number of at most {LARGEST_SCALE:g}, got {number}: leave it out for 1 / sqrt(D)"
        )
    return number


def checked_ratio(ratio: float, name: str) -> float:
    """A share of something; refuses what is no number from 0 to 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"{name} must be a number from 0 to 1, got a {type(ratio).__name__}: 0.06 is the published one")
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name} is a share and must lie in [0, 1], got {ratio}: 0.06 is the published one")
    return float(ratio)


def check_importance(importance: Tensor, mode: str) -> None:
    """Refuse what has no rows of blocks, and numbers that have no order or no sum."""
    if not isinstance(importance, Tensor) or importance.is_complex():
        kind = importance.dtype if isinstance(importance, Tensor) else f"a {type(importance).__name__}"
        raise TypeError(f"importance must be a tensor of real numbers [B, H, M, N], got {kind}")
    if importance.ndim < 1 or 0 in importance.shape:
        raise ValueError(
            f"importance must be [B, H, M, N] with at least one block a row, got shape {tuple(importance.shape)}"
        )
    if mode == "thresholdbound" and bool((importance < 0).any()):
        raise ValueError(
            f"thresholdbound adds importances up, so none may be negative, got {float(importance.min())}: "
            "use weights such as softmax gives, or mask_mode='topk'"
        )


def factors_of_map(level_map: Tensor, q: Tensor, block_m: int, block_n: int) -> Factors:
    """The factors of a level map, 1 always among them; refuses a map that does not fit the tokens and the blocks."""
    batch, heads, tokens, _ = q.shape
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        if isinstance(block, bool) or not isinstance(block, _INTEGERS):
            raise TypeError(f"{name} must be an integer, a power of two, got {block!r}")
        if not 1 <= block <= LARGEST_BLOCK or block & (block - 1):
            raise ValueError(f"{name} must be a power of two, got {block}; the largest is {LARGEST_BLOCK}")
    if not isinstance(level_map, Tensor):
        raise TypeError(
            f"level_map must be a tensor of integers [B, H, M, N], got a {type(level_map).__name__}: "
            "torch.as_tensor makes one"
        )
    expected = (batch, heads, -(-tokens // block_m), -(-tokens // block_n))
    if tuple(level_map.shape) != expected:
        raise ValueError(
            f"level_map must be [B, H, M, N] = {list(expected)} for {tokens} tokens in blocks of {block_m} queries and "
            f"{block_n} keys, got {list(level_map.shape)}"
        )
    if level_map.is_floating_point() or level_map.is_complex() or level_map.dtype == torch.bool:
        raise TypeError(
            f"level_map must hold integers, factors and 0 for skipped, got {level_map.dtype}: "
            "cast it with .to(torch.int16)"
        )
    used = set(level_map.long().unique().tolist())
    allowed = {0, *(1 << bit for bit in range(block_n.bit_length()))}
    if not used <= allowed:
        raise ValueError(
            f"level_map holds factors {sorted(used - allowed)}; "
            f"with block_n={block_n} a factor is one of {sorted(allowed)}"
        )
    return tuple(sorted(used - {0} | {1}))
