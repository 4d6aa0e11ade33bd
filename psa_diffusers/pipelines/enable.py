"""Switch pyramid sparse attention on and off in a diffusers pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from psa_diffusers.models.registry import Family, find_family, supported, unwrap
from psa_diffusers.pipelines.callback import call_with_clock
from psa_diffusers.pipelines.host import (
    add_to_pipelines,
    is_running,
    pop_subclass,
    push_subclass,
    refuse_impossible,
    register_for_guiders,
)
from psa_diffusers.pipelines.state import Switch, set_state, state_of
from psa_diffusers.presets import PSAPreset, load_preset
from psa_diffusers.processors import ulysses
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.choice import resolve_preset
from psa_diffusers.processors.run import Run, Site
from psa_diffusers.processors.standalone import PSAProcessor

__all__ = ["disable_psa", "enable_psa"]

logger = logging.getLogger("psa_diffusers")


def enable_psa(
    pipe: Any,
    preset: str | PSAPreset | None = None,
    *,
    config: str | Path | None = None,
    report: bool = False,
    **overrides: Any,
) -> Any:
    """Make the video self-attentions of a pipeline sparse. Weights and modules stay untouched; `disable_psa` undoes it.

    Size of the video, text length, guidance and the denoising step are read from what runs. Calls that cannot be
    sparse (warm-up steps, an attention mask, an unknown shape) run as before; `psa_report` says which and why.

    Args:
        pipe: A pipeline with a denoiser of a known family; of two experts (Wan 2.2) both are switched.
        preset: Name of a preset of the model's section in `configs/attention_config.yaml`, a `PSAPreset`, or None for
            the model's default. The section is found from the denoiser's own config. After `load_psa_lora` with a
            4-step LoRA the default is the preset that it was trained with.
        config: Path of a YAML with presets of your own, laid over the built-in file.
        report: Whether to record every call for `psa_report`. Costs a little time, and breaks the graph of a compiled
            denoiser at each self-attention; off, it costs nothing.
        **overrides: Preset fields by their YAML names: `warmup_steps=0`, `mask_ratios={1: [0, .1], 0: [.1, 1]}`.

    Returns:
        The pipeline itself.

    Raises:
        RuntimeError: If PSA is on already, the pipeline is running, or its denoiser runs ring attention over GPUs.
        TypeError: If no denoiser of the pipeline belongs to a known family, or `preset` is of a wrong type.
        ValueError: If there is no such preset, or an override is wrong.
            Whatever is raised, nothing has been changed.
    """
    found = find_denoisers(pipe)
    _check_free(pipe, found)
    _, denoiser, family = found[0]
    of_lora = state_of(pipe).default_preset
    if preset is None and of_lora is not None:
        resolved = load_preset(*of_lora, config=config, **overrides)
        title = f"PSA preset {resolved.name!r} of section {of_lora[0]}, which the LoRA was trained with"
    else:
        resolved, title = resolve_preset(preset, config, overrides, family=family, denoiser=denoiser, pipe=pipe)
    run = Run(resolved, title, report=report)
    sites = [(denoiser, Site(name, denoiser, family, run)) for name, denoiser, family in found]
    switch = Switch(run, {"preset": preset, "config": config, "report": report, **overrides}, sites)
    for denoiser, site in sites:
        switch.processors += _make_processors(denoiser, site)
    _refuse_ring(switch)

    # nothing above changes anything, nothing below can fail
    register_for_guiders(type(processor) for _, processor in switch.processors)
    for attention, processor in switch.processors:
        attention.processor = processor
    for denoiser, site in sites:
        switch.hooks.append(denoiser.register_forward_pre_hook(refuse_impossible, with_kwargs=True))
        switch.hooks.append(denoiser.register_forward_pre_hook(site.before_forward, with_kwargs=True))
    set_state(pipe, switch=switch)
    switch.call = call_with_clock(type(pipe), _check_before_call)
    switch.subclass = push_subclass(pipe, {"__call__": switch.call})
    names = " and ".join(name for name, _, _ in found)
    logger.info(
        "%s, in %d self-attentions of %s, %d warm-up steps", title, len(switch.processors), names, resolved.warmup_steps
    )
    return pipe


def disable_psa(pipe: Any) -> Any:
    """Put back the very processor objects that `enable_psa` found. A no-op when PSA is off.

    A processor that somebody else has set since then stays.

    Args:
        pipe: The pipeline that was given to `enable_psa`.

    Returns:
        The pipeline itself.
    """
    switch = state_of(pipe).switch
    if switch is None:
        return pipe
    switch.run.switch_off()
    for attention, processor in switch.processors:
        if attention.processor is processor:
            attention.processor = processor.original
    for hook in switch.hooks:
        hook.remove()
    set_state(pipe, switch=None)
    pop_subclass(pipe, switch.subclass)
    return pipe


def set_attn_processor(self: Any, processor: Any) -> None:
    """Set the attention processor of the pipeline's denoisers.

    `psa_diffusers` adds this method to diffusers pipelines. A `PSAProcessor` means `enable_psa`; anything else goes to
    the `set_attn_processor` of each denoiser, after PSA is switched off.

    Args:
        processor: A processor, or a dict of processors by name.

    Raises:
        TypeError: If the pipeline has no denoiser that takes attention processors.
    """
    if isinstance(processor, PSAProcessor):
        enable_psa(self, processor.preset, config=processor.config, report=processor.report, **processor.overrides)
        return
    names = ("transformer", "transformer_2", "unet")
    denoisers = [getattr(self, name, None) for name in names]
    denoisers = [denoiser for denoiser in denoisers if hasattr(denoiser, "set_attn_processor")]
    if not denoisers:
        raise TypeError(f"{type(self).__name__} has no denoiser with set_attn_processor among {', '.join(names)}")
    disable_psa(self)
    for denoiser in denoisers:
        # diffusers empties the dict it is given
        denoiser.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)


def find_denoisers(pipe: Any) -> list[tuple[str, nn.Module, Family]]:
    """Return name, module and family of the denoisers of a pipeline, compiled ones unwrapped."""
    if isinstance(pipe, nn.Module):
        raise TypeError(
            f"PSA needs a pipeline here, got the module {type(pipe).__name__}. For a denoiser alone use "
            "denoiser.set_attn_processor(PSAProcessor(...))"
        )
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"PSA needs a diffusers pipeline here, got {type(pipe).__name__}")
    modules = [(name, unwrap(part)) for name, part in components.items() if isinstance(part, nn.Module)]
    found = [(name, part, find_family(part)) for name, part in modules]
    found = [(name, part, family) for name, part, family in found if family is not None]
    if not found:
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in modules) or "no modules"
        known = supported(part for _, part in modules)
        raise TypeError(f"PSA knows no denoiser of this {type(pipe).__name__} ({parts}). {known}")
    return sorted(found, key=lambda entry: entry[0])


def _check_free(pipe: Any, found: list[tuple[str, nn.Module, Family]]) -> None:
    if state_of(pipe).switch is not None:
        raise RuntimeError("PSA is already enabled on this pipeline; call disable_psa(pipe) before changing the preset")
    for name, denoiser, _ in found:
        if any(
            isinstance(getattr(part, "processor", None), (FamilyProcessor, PSAProcessor)) for part in denoiser.modules()
        ):
            raise RuntimeError(
                f"the attentions of {name} have PSA processors already, through another pipeline that shares it or a "
                "PSAProcessor. Call disable_psa on that pipeline, or set the processors of the denoiser back, first"
            )
    if is_running(pipe):
        raise RuntimeError("the pipeline is running: call enable_psa before or after the call, not from a callback")


def _make_processors(denoiser: nn.Module, site: Site) -> list[tuple[nn.Module, FamilyProcessor]]:
    family, made, foreign = site.family, [], set()
    for layer, attention in family.self_attentions(denoiser).items():
        original = attention.processor
        if isinstance(original, nn.Module):
            # replacing it would take its weights out of the state_dict
            logger.warning("PSA leaves %s dense: its processor %s has weights", layer, type(original).__name__)
            continue
        if type(original) is not type(family.default_processor(denoiser, layer, attention)):
            foreign.add(type(original).__name__)
        made.append((attention, family.processor(layer, original, site)))
    if foreign:
        logger.warning("PSA replaces %s in sparse steps; dense steps keep it", " and ".join(sorted(foreign)))
    if not made:
        raise TypeError(f"PSA found no self-attention in {site.name}, a {type(denoiser).__name__}")
    return made


def _check_before_call(switch: Switch) -> None:
    _refuse_ring(switch)
    _check_processors(switch)


def _check_processors(switch: Switch) -> None:
    """Take over the processors that fuse_qkv_projections has put in the place of ours; warn of others."""
    lost = 0
    last = dict(switch.processors)  # of an attention that was fused before, the latest
    for denoiser, site in switch.sites:
        for layer, attention in site.family.self_attentions(denoiser).items():
            found = attention.processor
            if attention not in last or found is last[attention]:
                continue
            ours = [processor for module, processor in switch.processors if module is attention]
            if found in ours:  # fused and apart again
                switch.processors.remove((attention, found))
            elif type(found) is type(site.family.default_processor(denoiser, layer, attention)) and type(
                found
            ) is not type(last[attention].original):
                attention.processor = found = site.family.processor(layer, found, site)
            else:
                lost += 1
                continue
            switch.processors.append((attention, found))
    if lost:
        logger.warning(
            "%d PSA processors have been replaced since enable_psa: these layers are dense. Call disable_psa(pipe), "
            "then enable_psa again",
            lost,
        )


def _refuse_ring(switch: Switch) -> None:
    configs = [ulysses.context_parallel(processor.original) for _, processor in switch.processors]
    if switch.run.preset.type != "dense" and any(config is not None and config.ring_degree > 1 for config in configs):
        raise RuntimeError(ulysses.RING)


add_to_pipelines(set_attn_processor)
