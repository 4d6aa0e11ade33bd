"""Runs every launch of a small video once, for compute-sanitizer:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/memcheck.py
"""

import torch

from psa_diffusers import PSAPreset, psa_attention

COVER = {1: [0, 0.06], 2: [0.06, 0.1], 4: [0.1, 0.2], 8: [0.2, 0.3], 16: [0.3, 0.4], 32: [0.4, 1]}
GRID, TEXT = (5, 9, 23), 226


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = TEXT + GRID[0] * GRID[1] * GRID[2]
    for dim in (64, 128):
        for block in (128, 64, 32):
            q, k, v = (
                torch.randn(1, tokens, 2, dim, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                for _ in range(3)
            )
            preset = PSAPreset(
                mask_ratios=COVER, block_size={"m": block, "n": block}, key_variance=True, value_tilt=True,
                importance="pooled_moments", tilt_gain="sampled", use_sim_mask=block == 32,
            )  # fmt: skip
            out = psa_attention(q, k, v, preset, grid=GRID, text_tokens=TEXT)
            if not torch.isfinite(out).all():
                raise SystemExit(f"head dimension {dim}, blocks of {block}: NaN or infinities in the output")


if __name__ == "__main__":
    main()
