"""Wan VACE."""

from __future__ import annotations

from typing import Any

from .case import Case
from .parts import picture, pictures
from .wan import WAN, wan


def _build(layers: list[int], **transformer: Any) -> Any:
    return wan(
        "WanVACEPipeline", kind="WanVACETransformer3DModel", vace_layers=layers, vace_in_channels=96, **transformer
    )


VACE = {
    **WAN,
    "family": "Wan VACE",
    "pipeline": "WanVACEPipeline",
    "attentions": r"(vace_)?blocks\.\d+\.attn1",
    "several": False,
}
MORE = {
    "wan-vace": Case(build=lambda **kw: _build([0], **kw), layers=3, **VACE),
    "wan-vace-references": Case(
        build=lambda **kw: _build([0, 1], **kw),
        layers=4,
        # the reference is a frame of the grid
        extra=lambda height, width, frames: {
            "num_frames": frames - 4,
            "video": pictures(height, width, frames - 4),
            "reference_images": [picture(height, width)],
        },
        **VACE,
    ),
}
