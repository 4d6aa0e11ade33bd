"""Framepack."""

from __future__ import annotations

from typing import Any

from .case import DROP, Case
from .hunyuan_video import HUNYUAN_VIDEO, SMALL, hunyuan_video, hunyuan_video_embeds
from .parts import denoiser, picture, siglip


def framepack(**transformer: Any) -> Any:
    model = denoiser(
        "HunyuanVideoFramepackTransformer3DModel",
        transformer,
        **SMALL,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    return hunyuan_video("HunyuanVideoFramepackPipeline", siglip(), model)


def _window(height: int, width: int, frames: int) -> dict[str, Any]:
    """A video of one window."""
    return {"image": picture(height, width), "latent_window_size": (frames + 3) // 4, "max_sequence_length": DROP}


def history_tokens(height: int, width: int) -> int:
    """Two frames in full, two pooled by 2 and sixteen by 4 in all directions."""
    return 2 * height * width + -(-height // 2) * -(-width // 2) + 4 * -(-height // 4) * -(-width // 4)


FRAMEPACK = {
    **HUNYUAN_VIDEO,
    "family": "Framepack",
    "translate": lambda asked: {**hunyuan_video_embeds(asked), "output_type": "pt"},
}
MORE = {
    "framepack": Case(
        pipeline="HunyuanVideoFramepackPipeline",
        build=framepack,
        text=4,
        context=history_tokens,
        extra=_window,
        several=False,
        **FRAMEPACK,
    ),
}
