"""Helios."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import DROP, Case
from .framepack import history_tokens
from .parts import assemble, denoiser, umt5
from .wan import wan_vae


def helios(pipeline: str = "HeliosPipeline", *, stages: int = 1, **transformer: Any) -> Any:
    # with the published gamma of 1/3 the noise between stages has a covariance that a CPU finds singular
    edges = [stage / stages for stage in range(stages + 1)]
    return assemble(
        pipeline,
        **umt5(),
        vae=wan_vae(),
        scheduler=diffusers.HeliosScheduler(stage_range=edges, stages=stages, gamma=0.3, use_flow_sigmas=True),
        transformer=denoiser(
            "HeliosTransformer3DModel",
            transformer,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_dim=(4, 6, 6),
            is_amplify_history=True,
        ),
    )


def _chunk(height: int, width: int, frames: int) -> dict[str, Any]:
    """A video of one chunk."""
    return {"num_latent_frames_per_chunk": (frames + 3) // 4}


def _stages(height: int, width: int, frames: int) -> dict[str, Any]:
    own = {"num_inference_steps": DROP, "pyramid_num_inference_steps_list": [2, 2]}
    return {**_chunk(height, width, frames), **own}


HELIOS = {
    "family": "Helios",
    "attentions": r"blocks\.\d+\.attn1",
    "passes": 2,
    "context": history_tokens,
    "translate": lambda asked: {"output_type": "pt"},
    "several": False,
}
MORE = {"helios": Case(pipeline="HeliosPipeline", build=helios, extra=_chunk, **HELIOS)}
OTHER = {
    "helios-pyramid": Case(
        pipeline="HeliosPyramidPipeline",
        build=lambda **kw: helios("HeliosPyramidPipeline", stages=2, **kw),
        # the first stage has half the height and width
        grid=(3, 8, 8),
        extra=_stages,
        **HELIOS,
    ),
}
