"""SkyReels-V2."""

from __future__ import annotations

from typing import Any

from .case import Case
from .parts import one_picture, pictures
from .wan import WAN, wan, wan_i2v, wan_image

KIND = "SkyReelsV2Transformer3DModel"


def _forcing(pipeline: str, **transformer: Any) -> Any:
    """Diffusion forcing: every frame has a timestep of its own."""
    return wan(pipeline, kind=KIND, multistep=True, **transformer)


SKYREELS = {**WAN, "family": "SkyReels-V2"}
MORE = {
    "skyreels": Case(
        pipeline="SkyReelsV2Pipeline", build=lambda **kw: wan("SkyReelsV2Pipeline", kind=KIND, **kw), **SKYREELS
    ),
    "skyreels-i2v": Case(
        pipeline="SkyReelsV2ImageToVideoPipeline",
        build=lambda **kw: wan_i2v("SkyReelsV2ImageToVideoPipeline", kind=KIND, **kw),
        extra=wan_image,
        several=False,
        **SKYREELS,
    ),
    "skyreels-forcing": Case(
        pipeline="SkyReelsV2DiffusionForcingPipeline",
        build=lambda **kw: _forcing("SkyReelsV2DiffusionForcingPipeline", **kw),
        **SKYREELS,
    ),
}
OTHER = {
    "skyreels-forcing-i2v": Case(
        pipeline="SkyReelsV2DiffusionForcingImageToVideoPipeline",
        build=lambda **kw: _forcing("SkyReelsV2DiffusionForcingImageToVideoPipeline", **kw),
        extra=one_picture,
        several=False,
        **SKYREELS,
    ),
    "skyreels-forcing-v2v": Case(
        pipeline="SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        build=lambda **kw: _forcing("SkyReelsV2DiffusionForcingVideoToVideoPipeline", **kw),
        # goes on from the last two latent frames of nine frames
        extra=lambda height, width, frames: {
            "video": pictures(height, width, 9),
            "overlap_history": 5,
            "base_num_frames": frames,
            "num_frames": frames + 4,
        },
        several=False,
        **SKYREELS,
    ),
}
