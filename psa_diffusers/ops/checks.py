"""Refuses what the operation cannot take, with what was expected, what came and what to do."""

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.types import Factors, Schedule


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors that do not fit each other, and dtypes and head dimensions that no backend takes."""
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
    sizes = (1, 1, q.shape[2] - text_tokens) if grid is None else tuple(int(size) for size in grid)
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


def check_schedule(schedule: Schedule, q: Tensor, layout: Layout, factors: Factors) -> None:
    """Refuse what would read out of range. The numbers in it are not read: that would wait for the GPU."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule that psa_attention returned, got a {type(schedule).__name__}")
    shape = (q.shape[0], q.shape[1], layout.num_query_blocks, layout.num_key_blocks)
    expected = {
        "[B, H, M, N]": shape,
        "[B, H, M, F + 1]": (*shape[:3], len(factors) + 1),
        "block_n": layout.block_n,
        "factors": factors,
        "device": q.device,
    }
    ids, offsets = schedule.block_ids, schedule.offsets
    has = (tuple(ids.shape), tuple(offsets.shape), schedule.block_n, schedule.factors, ids.device)
    found = dict(zip(expected, has, strict=True))
    if found != expected:
        told = [", ".join(f"{name} = {value}" for name, value in each.items()) for each in (expected, found)]
        raise ValueError(f"schedule is of another call: expected {told[0]}; got {told[1]}. Leave it out to decide anew")


def factors_of_map(level_map: Tensor, q: Tensor, block_m: int, block_n: int) -> Factors:
    """The factors of a level map, 1 always among them; refuses a map that does not fit the tokens and the blocks."""
    batch, heads, tokens, _ = q.shape
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        if block < 1 or block & (block - 1):
            raise ValueError(f"{name} must be a power of two, got {block}")
    expected = (batch, heads, -(-tokens // block_m), -(-tokens // block_n))
    if tuple(level_map.shape) != expected:
        raise ValueError(
            f"level_map must be [B, H, M, N] = {list(expected)} for {tokens} tokens in blocks of {block_m} queries and "
            f"{block_n} keys, got {list(level_map.shape)}"
        )
    used = set(level_map.unique().tolist()) if level_map.numel() else set()
    allowed = {0, *(1 << bit for bit in range(block_n.bit_length()))}
    if not used <= allowed:
        raise ValueError(
            f"level_map holds factors {sorted(used - allowed)}; "
            f"with block_n={block_n} a factor is one of {sorted(allowed)}"
        )
    return tuple(sorted(used - {0} | {1}))
