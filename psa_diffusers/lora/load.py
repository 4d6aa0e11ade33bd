"""Load a LoRA into a video pipeline, checked before anything changes, with the settings that a few-step LoRA needs."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from psa_diffusers.lora.adapters import (
    active_adapters,
    adapters_of,
    delete_adapter,
    fuse_adapters,
    fused_adapters,
    loadable_parts,
    take_out_of_weights,
)
from psa_diffusers.lora.check import Change, changes_of, check_values
from psa_diffusers.lora.files import read_lora
from psa_diffusers.lora.metadata import adapter_settings, check_components, scaling_of
from psa_diffusers.lora.recipes import choose_recipe
from psa_diffusers.lora.restore import Before
from psa_diffusers.lora.undo import apply_setup, check_idle, forget_adapters, make_setup, setup_of
from psa_diffusers.pipelines.host import unwrap

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
    exists, that its keys are those of a diffusers LoRA, that every target exists and has the right shape, that every
    number is finite. Of the settings of peft in the file only the strength is used, and the weights decide the rest.

    A LoRA that was distilled to four steps with PSA (CogVideoX-5B, Wan2.1-1.3B, the demo model) is recognised by its
    form, and the pipeline gets what it needs: its scheduler; four steps and guidance 1.0 as defaults of the call; the
    preset that it was trained with, psa_4steps, as default of `enable_psa`. All of it goes back with
    `unload_psa_lora(pipe)` or `pipe.unload_lora_weights()`.

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
            Until that is done, main memory holds a copy of the weights that change.
        few_steps: Whether it is a LoRA for four steps. None recognises that: the rank of the published one (64, of
            the demo model 48) on the attention projections of every block, and nothing else. False loads any such file
            as an ordinary LoRA, True any LoRA of such a model with the settings for four steps.
        load_into_transformer_2: Whether a file without keys for `transformer_2` is for the second expert (Wan 2.2). A
            file with keys for both goes to both.

    Returns:
        The pipeline itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no plain LoRA of this model, something in it or `scale` is not finite, the adapter name is
            taken, or `few_steps` is True for a model without such a LoRA.
        TypeError: If the pipeline cannot load LoRAs, or an argument is of a wrong type.
        RuntimeError: If the pipeline is running and the LoRA would change its schedule.
            Whatever is raised, the pipeline is as it was, to the bit.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"load_psa_lora needs a pipeline that can load LoRAs, got {type(pipe).__name__}")
    _check_arguments(adapter_name, scale)
    weights, metadata = read_lora(pipe, source, weight_name)
    if load_into_transformer_2 and not any(key.startswith("transformer_2.") for key in weights):
        weights = {re.sub(r"^transformer\.", "transformer_2.", key): weight for key, weight in weights.items()}
        metadata = metadata and {re.sub(r"^transformer\.", "transformer_2.", key): metadata[key] for key in metadata}
    check_components(metadata, pipe._lora_loadable_modules, source)
    changes = changes_of(pipe, weights, source)
    modules = {name: {path: change.rank for path, change in each.items()} for name, each in changes.items()}
    denoisers: dict[str, Any] = {component: unwrap(getattr(pipe, component)) for component in changes}
    for component, denoiser in denoisers.items():
        if adapter_name in getattr(denoiser, "peft_config", {}):
            raise ValueError(
                f"{component} has an adapter {adapter_name!r} already; choose another adapter_name, or call "
                f"unload_psa_lora(pipe, {adapter_name!r}) first"
            )
    settings = {}
    for component, ranks in modules.items():
        settings[component] = adapter_settings(ranks, metadata, component, source)
        scalings = {path: scale * scaling_of(settings[component], path, rank) for path, rank in ranks.items()}
        check_values(denoisers[component], changes[component], scalings, source)
    recipe = choose_recipe(pipe, modules, few_steps)
    setup = None if recipe is None else make_setup(pipe, recipe, adapter_name)

    fused = {component: fused_adapters(denoiser) for component, denoiser in denoisers.items()}
    if any(fused.values()) and not fuse:
        names = ", ".join(sorted({name for names in fused.values() for name in names}))
        raise ValueError(
            f"the adapters {names} are fused into the weights, and peft computes with fused or with loose adapters, "
            "not with both. Pass fuse=True to fuse this one as well, or call pipe.unfuse_lora() first"
        )
    merged = [layer for name, each in denoisers.items() for layer in _merged(each, changes[name])] if fuse else []
    before = Before(pipe, merged)
    try:
        for component, denoiser in denoisers.items():
            take_out_of_weights(pipe, fused[component], only=component, for_now=True)
            _insert(pipe, denoiser, changes[component], settings[component], adapter_name)
            # of the denoiser, not of the pipeline: what the other expert has stays
            denoiser.set_adapters([adapter_name], [scale])
            if fuse:
                fuse_adapters(pipe, component, [*fused[component], adapter_name])
        if setup is not None:
            apply_setup(pipe, setup)
    except BaseException:
        before.restore()
        raise
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


def _check_arguments(adapter_name: Any, scale: Any) -> None:
    if not isinstance(scale, Real):
        raise TypeError(f"scale is {scale!r}, expected a number; 1.0 is the strength as trained")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, expected a finite number; 1.0 is the strength as trained")
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name is {adapter_name!r}, expected a string")
    # it becomes the name of a module
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(f"adapter_name is {adapter_name!r}, expected a name without dots that torch does not use")


def _merged(denoiser: nn.Module, changes: Mapping[str, Change]) -> list[nn.Module]:
    """Return the modules whose weights change when a LoRA is fused: its own, and those that are fused already."""
    fused = [module for module in denoiser.modules() if getattr(module, "merged_adapters", None)]
    return [*(denoiser.get_submodule(path) for path in changes), *fused]


def _insert(
    pipe: Any, denoiser: Any, changes: Mapping[str, Change], settings: Mapping[str, Any], adapter_name: str
) -> None:
    """Put the layers of an adapter into a denoiser."""
    has_bias = any(change.bias is not None for change in changes.values())
    weights = {}
    for path, change in changes.items():
        weights[f"{path}.lora_A.weight"] = change.down
        weights[f"{path}.lora_B.weight"] = change.up
        if has_bias:  # of all layers or of none
            bias = change.up.new_zeros(len(change.up)) if change.bias is None else change.bias
            weights[f"{path}.lora_B.bias"] = bias
    denoiser.load_lora_adapter(
        weights,
        prefix=None,
        adapter_name=adapter_name,
        metadata={**settings, "lora_bias": has_bias},
        low_cpu_mem_usage=True,  # and no random numbers are drawn
        _pipeline=pipe,
    )
    missing = [path for path in changes if adapter_name not in getattr(denoiser.get_submodule(path), "lora_A", ())]
    if missing:
        raise RuntimeError(f"peft has put no adapter into {missing[0]}, nor into {len(missing) - 1} other modules")
