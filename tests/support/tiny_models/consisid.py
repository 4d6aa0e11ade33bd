"""ConsisID."""

from __future__ import annotations

from typing import Any

import torch

from .case import TEXT_TOKENS, Case
from .cogvideox import SMALL, cogvideox
from .parts import denoiser, one_picture


def consisid(**transformer: Any) -> Any:
    model = denoiser(
        "ConsisIDTransformer3DModel",
        transformer,
        **SMALL,
        in_channels=8,
        num_layers=2,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=2,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    # diffusers offers it where OpenCV is installed, which only draws the face that we do not need
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    return cogvideox(ConsisIDPipeline, model)


def _face(height: int, width: int, frames: int) -> dict[str, Any]:
    own = {"id_vit_hidden": [torch.ones(1, 2, 8)], "id_cond": torch.ones(1, 8)}
    return {**one_picture(height, width, frames), **own}


MORE = {
    "consisid": Case(
        family="ConsisID",
        pipeline="ConsisIDPipeline",
        build=consisid,
        attentions=r"transformer_blocks\.\d+\.attn1",
        text=TEXT_TOKENS,
        extra=_face,
        several=False,
    ),
}
