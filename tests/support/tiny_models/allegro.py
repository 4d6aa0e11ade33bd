"""Allegro."""

from __future__ import annotations

from typing import Any

from diffusers import EulerAncestralDiscreteScheduler

from .case import Case
from .parts import assemble, denoiser, t5


def allegro(**transformer: Any) -> Any:
    return assemble(
        "AllegroPipeline",
        **t5(),
        vae=None,
        transformer=denoiser(
            "AllegroTransformer3DModel",
            transformer,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            caption_channels=32,
        ),
        scheduler=EulerAncestralDiscreteScheduler(),
    )


MORE = {
    "allegro": Case(
        family="Allegro", pipeline="AllegroPipeline", build=allegro, attentions=r"transformer_blocks\.\d+\.attn1"
    ),
}
