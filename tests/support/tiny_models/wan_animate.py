"""Wan Animate."""

from __future__ import annotations

from typing import Any

from .case import DROP, Case
from .parts import pictures
from .wan import WAN, wan_i2v, wan_image


def wan_animate(**transformer: Any) -> Any:
    return wan_i2v(
        "WanAnimatePipeline",
        kind="WanAnimateTransformer3DModel",
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        **transformer,
    )


def _animate(height: int, width: int, frames: int) -> dict[str, Any]:
    # the picture is the first frame of the grid
    frames -= 4
    poses, faces = pictures(height, width, frames), pictures(16, 16, frames)
    own = {"pose_video": poses, "face_video": faces, "segment_frame_length": frames, "num_frames": DROP}
    return {**wan_image(height, width, frames), **own}


MORE = {
    "wan-animate": Case(
        pipeline="WanAnimatePipeline",
        build=wan_animate,
        extra=_animate,
        several=False,
        **{**WAN, "family": "Wan Animate"},
    ),
}
