"""Cosmos 1, 2 and 2.5."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from .case import Case
from .parts import assemble, denoiser, embeds_for_prompts, one_picture, pictures, seeded, t5
from .wan import flow_multistep, wan_vae

SMALL = {"text_embed_dim": 32, "adaln_lora_dim": 4, "max_size": (16, 32, 32)}


class Trusting:
    """Stands for the safety checker of Cosmos, which is a package of its own."""

    def to(self, device: Any) -> Trusting:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def cosmos(
    pipeline: str = "CosmosTextToWorldPipeline",
    vae: Any = None,
    scheduler: Any = None,
    parts: dict[str, Any] | None = None,
    **transformer: Any,
) -> Any:
    return assemble(
        pipeline,
        **t5(),
        transformer=denoiser(
            "CosmosTransformer3DModel",
            transformer,
            **SMALL,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            concat_padding_mask=False,
        ),
        vae=vae,
        scheduler=scheduler or diffusers.EDMEulerScheduler(sigma_schedule="karras", final_sigmas_type="sigma_min"),
        safety_checker=Trusting(),
        **(parts or {}),
    )


def cosmos_vae() -> Any:
    return seeded(
        diffusers.AutoencoderKLCosmos,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    )


def cosmos2(pipeline: str, scheduler: Any, **kwargs: Any) -> Any:
    """Cosmos 2 and 2.5: the latents of Wan, and a mask of what is given."""
    return cosmos(pipeline, wan_vae(), scheduler, in_channels=17, out_channels=16, **kwargs)


def cosmos_transfer(**kwargs: Any) -> Any:
    image = {"img_context_dim_in": 8, "img_context_dim_out": 32}
    controlnet = denoiser(
        "CosmosControlNetModel",
        image,
        **SMALL,
        n_controlnet_blocks=1,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
    )
    return cosmos2(
        "Cosmos2_5_TransferPipeline",
        flow_multistep(),
        parts={"controlnet": controlnet},
        controlnet_block_every_n=2,
        img_context_num_tokens=4,
        **image,
        **kwargs,
    )


def _embeds(asked: dict[str, Any]) -> dict[str, Any]:
    return embeds_for_prompts(asked, lambda embeds, mask: {"prompt_embeds": embeds}, width=32)


COSMOS = {
    "family": "Cosmos",
    "attentions": r"transformer_blocks\.\d+\.attn1",
    "passes": 2,
    "has_float64": False,
}
MORE = {
    "cosmos1": Case(pipeline="CosmosTextToWorldPipeline", build=cosmos, frames_per_latent=8, **COSMOS),
}
OTHER = {
    "cosmos1-v2w": Case(
        pipeline="CosmosVideoToWorldPipeline",
        build=lambda **kw: cosmos("CosmosVideoToWorldPipeline", cosmos_vae(), in_channels=5, **kw),
        extra=one_picture,
        frames_per_latent=8,
        several=False,
        **COSMOS,
    ),
    "cosmos2": Case(
        pipeline="Cosmos2VideoToWorldPipeline",
        build=lambda **kw: cosmos2(
            "Cosmos2VideoToWorldPipeline", FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), **kw
        ),
        extra=one_picture,
        several=False,
        **COSMOS,
    ),
    "cosmos2.5": Case(
        pipeline="Cosmos2_5_PredictBasePipeline",
        build=lambda **kw: cosmos2("Cosmos2_5_PredictBasePipeline", flow_multistep(), **kw),
        extra=lambda height, width, frames: {"video": pictures(height, width, 5)},
        translate=_embeds,
        several=False,
        **COSMOS,
    ),
    "cosmos2.5-transfer": Case(
        pipeline="Cosmos2_5_TransferPipeline",
        build=cosmos_transfer,
        extra=lambda height, width, frames: {
            "controls": pictures(height, width, frames),
            "num_frames_per_chunk": frames,
        },
        translate=_embeds,
        several=False,
        **COSMOS,
    ),
}
