"""LoRA files for the tiny models, in the layout of the published ones."""

import torch
from safetensors.torch import save_file

BLOCKS = {"cogvideox": "transformer_blocks", "wan2.1": "blocks", "wan2.2-a14b": "blocks"}


def lora_weights(
    name, *, prefix="transformer", rank=4, width=32, halves=("lora_A.weight", "lora_B.weight"), blocks=2, seed=1
):
    """LoRA on the projections of the self-attentions of all blocks, in the layout of the published files.

    Small enough that bf16 and float16 bear it, large enough to matter.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for block in range(blocks):
        for target in ("to_q", "to_k", "to_v", "to_out.0"):
            path = f"{prefix}.{BLOCKS[name]}.{block}.attn1.{target}"
            weights[f"{path}.{halves[0]}"] = torch.randn(rank, width, generator=rng) / rank**0.5
            weights[f"{path}.{halves[1]}"] = torch.randn(width, rank, generator=rng)
    return weights


def lora_file(folder, name, **kwargs):
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(lora_weights(name, **kwargs), path)
    return path
