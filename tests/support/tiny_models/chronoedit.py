"""ChronoEdit."""

from __future__ import annotations

from .case import Case
from .wan import WAN, wan_i2v, wan_image

MORE = {
    "chronoedit": Case(
        pipeline="ChronoEditPipeline",
        build=lambda **kw: wan_i2v("ChronoEditPipeline", kind="ChronoEditTransformer3DModel", multistep=True, **kw),
        # without these it makes two frames
        extra=lambda height, width, frames: {
            **wan_image(height, width, frames),
            "enable_temporal_reasoning": True,
            "num_temporal_reasoning_steps": 9,
        },
        several=False,
        **{**WAN, "family": "ChronoEdit"},
    ),
}
