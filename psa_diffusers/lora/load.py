"""Load a LoRA into a video pipeline, checked before anything changes, with the settings that a few-step LoRA needs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from psa_diffusers.lora.adapters import (
    active_adapters,
    adapters_of,
    delete_adapter,
    fuse_adapters,
    fused_adapters,
    loadable_parts,
    take_out_of_weights,
)
from psa_diffusers.lora.check import check_lora
from psa_diffusers.lora.files import read_lora
from psa_diffusers.lora.recipes import choose_recipe
from psa_diffusers.lora.undo import apply_setup, check_idle, forget_adapters, make_setup, setup_of
from psa_diffusers.models.registry import unwrap

__all__ = ["load_psa_lora", "unload_psa_lora"]

logger = logging.getLogger("psa_diffusers")


def load_psa_lora(
    pipe: Any,
    source: str | Path,
    *,
    weight_name: str | None = None,
    adapter_name: str = "psa",
    scale: float = 1.0,
    fuse: bool = False,
    few_steps: bool | None = None,
    load_into_transformer_2: bool = False,
) -> Any:
    """Load a LoRA from a safetensors file and make it the active adapter.

    Works before and after `enable_psa`, with the same result. The file is checked against the denoiser first: that it
    exists, that its keys are those of a diffusers LoRA, that every target exists and has the right shape.

    A LoRA that was distilled to four steps with PSA (CogVideoX-5B, Wan2.1-1.3B) is recognised by its form, and the
    pipeline gets what it needs: its scheduler; four steps and guidance 1.0 as defaults of the call; the preset that it
    was trained with, psa_4steps, as default of `enable_psa`. All of it goes back with `unload_psa_lora(pipe)` or
    `pipe.unload_lora_weights()`.

        pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", torch_dtype=torch.bfloat16).to("cuda")
        load_psa_lora(pipe, "GYP666/BLADE")
        enable_psa(pipe)
        video = pipe("a panda plays the guitar").frames[0]

    Args:
        pipe: A diffusers pipeline that can load LoRAs.
        source: A safetensors file, a folder with one, or a repository on the hub.
        weight_name: The file in the folder or repository, if it has several. Of the repository with the published
            LoRAs, the one for this pipeline is known.
        adapter_name: Name of the adapter, for `pipe.set_adapters` and `pipe.delete_adapters`. Other adapters of the
            denoiser become inactive, as always when diffusers loads one; `pipe.set_adapters([...], [...])` combines
            several.
        scale: Strength, 1.0 as trained.
        fuse: Whether to merge the LoRA into the weights: faster, undone (to rounding) by `unload_psa_lora(pipe)`.
        few_steps: Whether it is a LoRA for four steps. None recognises that: rank 64 on the attention projections of
            every block, and nothing else, of a model that has such a LoRA. False loads any such file as an ordinary
            LoRA, True any LoRA of such a model with the settings for four steps.
        load_into_transformer_2: Whether a file without keys for `transformer_2` is for the second expert (Wan 2.2). A
            file with keys for both goes to both.

    Returns:
        The pipeline itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no LoRA of this model, the adapter name is taken, or `few_steps` is True for a model
            without such a LoRA.
        TypeError: If the pipeline cannot load LoRAs.
        RuntimeError: If the pipeline is running and the LoRA would change its schedule.
            Whatever is raised, the pipeline has not been changed.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"load_psa_lora needs a pipeline that can load LoRAs, got {type(pipe).__name__}")
    weights, metadata = read_lora(pipe, source, weight_name)
    if load_into_transformer_2 and not any(key.startswith("transformer_2.") for key in weights):
        weights = {re.sub(r"^transformer\.", "transformer_2.", key): weight for key, weight in weights.items()}
        metadata = metadata and {re.sub(r"^transformer\.", "transformer_2.", key): metadata[key] for key in metadata}
    modules = check_lora(pipe, weights, source)
    denoisers: dict[str, Any] = {component: unwrap(getattr(pipe, component)) for component in modules}
    for component, denoiser in denoisers.items():
        if adapter_name in getattr(denoiser, "peft_config", {}):
            raise ValueError(
                f"{component} has an adapter {adapter_name!r} already; choose another adapter_name, or call "
                f"unload_psa_lora(pipe, {adapter_name!r}) first"
            )
    recipe = choose_recipe(pipe, modules, few_steps)
    setup = None if recipe is None else make_setup(pipe, recipe, adapter_name)

    active = {component: active_adapters(denoiser) for component, denoiser in denoisers.items()}
    fused = {component: fused_adapters(denoiser) for component, denoiser in denoisers.items()}
    if any(fused.values()) and not fuse:
        names = ", ".join(sorted({name for names in fused.values() for name in names}))
        raise ValueError(
            f"the adapters {names} are fused into the weights, and peft computes with fused or with loose adapters, "
            "not with both. Pass fuse=True to fuse this one as well, or call pipe.unfuse_lora() first"
        )
    try:
        for component, denoiser in denoisers.items():
            take_out_of_weights(pipe, fused[component], only=component, for_now=True)
            denoiser.load_lora_adapter(
                weights, prefix=component, adapter_name=adapter_name, metadata=metadata, _pipeline=pipe
            )
            # of the denoiser, not of the pipeline: what the other expert has stays
            denoiser.set_adapters([adapter_name], [scale])
            if fuse:
                fuse_adapters(pipe, component, [*fused[component], adapter_name])
    except BaseException:
        take_out_of_weights(pipe, [adapter_name], for_now=True)
        for component, denoiser in denoisers.items():
            delete_adapter(denoiser, adapter_name, active[component])
            if fused[component] and not fused_adapters(denoiser):
                fuse_adapters(pipe, component, fused[component])
        raise
    if setup is not None:
        apply_setup(pipe, setup)
    logger.info("LoRA %s in %s as %r, scale %g", source, " and ".join(denoisers), adapter_name, scale)
    return pipe


def unload_psa_lora(pipe: Any, adapter_name: str = "psa") -> Any:
    """Take a LoRA out again, out of the weights too if it was fused, and give back what it has set in the pipeline.

    Args:
        pipe: A pipeline after `load_psa_lora`.
        adapter_name: Name of the adapter. Other adapters stay; without any left, the denoiser has its own modules back.

    Returns:
        The pipeline itself.

    Raises:
        ValueError: If there is no such adapter. The message lists those that there are.
        RuntimeError: If the pipeline is running and the LoRA has changed its schedule.
    """
    denoisers = loadable_parts(pipe).values()
    names = sorted({name for denoiser in denoisers for name in adapters_of(denoiser)})
    if adapter_name not in names:
        raise ValueError(f"the pipeline has no adapter {adapter_name!r}; it has {', '.join(names) or 'none'}")
    if setup_of(pipe) is not None:
        check_idle(pipe)
    take_out_of_weights(pipe, [adapter_name])
    for denoiser in denoisers:
        delete_adapter(denoiser, adapter_name, [name for name in active_adapters(denoiser) if name != adapter_name])
    forget_adapters(pipe)
    return pipe
