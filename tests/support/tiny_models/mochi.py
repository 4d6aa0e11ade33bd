"""Mochi."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from .case import TEXT_TOKENS, Case
from .parts import assemble, denoiser, t5


def mochi(**transformer: Any) -> Any:
    return assemble(
        "MochiPipeline",
        **t5(),
        vae=None,
        transformer=denoiser(
            "MochiTransformer3DModel",
            transformer,
            num_layers=2,
            pooled_projection_dim=32,
            in_channels=4,
            text_embed_dim=32,
            time_embed_dim=8,
            max_sequence_length=TEXT_TOKENS,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


MORE = {
    "mochi": Case(
        family="Mochi",
        pipeline="MochiPipeline",
        build=mochi,
        attentions=r"transformer_blocks\.\d+\.attn1",
        padded=2,
        frames_per_latent=6,
    ),
}
