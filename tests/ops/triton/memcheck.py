"""Runs every launch of a small video once, where a read or write out of bounds is found.

On a GPU:
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/ops/triton/memcheck.py
In the interpreter, on Linux, where memory before and past each tensor is forbidden:
    TRITON_INTERPRET=1 python tests/ops/triton/memcheck.py
"""

import ctypes
import faulthandler
import math
import mmap
import os

import torch

from psa_diffusers import PSAPreset, psa_attention

COVER = {1: [0, 0.06], 2: [0.06, 0.1], 4: [0.1, 0.2], 8: [0.2, 0.3], 16: [0.3, 0.4], 32: [0.4, 1]}
PAGE = mmap.PAGESIZE


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        run("cuda", torch.bfloat16, (5, 9, 23), 226, 2, dims=(64, 128, 192), blocks=(128, 64, 32))
        return
    faulthandler.enable()  # says which kernel it was
    torch.empty, torch.empty_like = walled, lambda like: walled(like.shape, dtype=like.dtype)
    # one block holds all of the video, the last token too, whatever is sampled of it
    run("cpu", torch.float16, (2, 5, 6), 10, 1, dims=(72, 160, 192), blocks=(64,))
    run("cpu", torch.float32, (2, 5, 6), 10, 1, dims=(192,), blocks=(32,))


def run(device, dtype, grid, text, heads, dims, blocks) -> None:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, text + math.prod(grid), heads)
    for dim in dims:
        for block in blocks:
            drawn = (torch.randn(*shape, dim, generator=generator, device=device).to(dtype) for _ in range(3))
            q, k, v = (torch.empty_like(x).copy_(x).transpose(1, 2) for x in drawn)
            preset = PSAPreset(
                mask_ratios=COVER, block_size={"m": block, "n": block}, key_variance=True, value_tilt=True,
                importance="pooled_moments", tilt_gain="sampled", use_sim_mask=block == 32,
            )  # fmt: skip
            out = psa_attention(q, k, v, preset, grid=grid, text_tokens=text, backend="triton")
            if not torch.isfinite(out).all():
                raise SystemExit(f"head dimension {dim}, blocks of {block}: NaN or infinities in the output")


def walled(*shape, dtype=torch.float32, device="cpu"):
    """As `torch.empty`, of NaN or -1, between two pages that nobody may read or write."""
    shape = torch.Size(shape[0] if not isinstance(shape[0], int) else shape)
    size = shape.numel() * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for wall in (start, start + (pages + 1) * PAGE):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), PAGE, 0):
            raise OSError("mprotect failed")
    out = torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=(pages + 1) * PAGE - size).view(shape)
    return out.fill_(math.nan if dtype.is_floating_point else -1)


if __name__ == "__main__":
    main()
