"""Switch pyramid sparse attention on and off in a diffusers pipeline."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from psa_diffusers.models.registry import Family, attention_paths, find_family, supported
from psa_diffusers.pipelines.host import (
    add_to_pipelines,
    is_running,
    modules_of,
    register_for_guiders,
    unwrap,
)
from psa_diffusers.pipelines.state import Switch, set_state, state_of
from psa_diffusers.presets import PSAPreset, load_preset
from psa_diffusers.processors import ulysses
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.calls import Listener
from psa_diffusers.processors.choice import resolve_preset
from psa_diffusers.processors.run import Run
from psa_diffusers.processors.site import Site
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

    On a pipeline that has PSA already the preset changes; if the new one is wrong, everything stays as it was. A
    denoiser that is exchanged later gets PSA at the next call. A deep copy or a pickle of the pipeline has PSA on, by a
    switch of its own.

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
        RuntimeError: If a denoiser has PSA through another pipeline, the pipeline is running, or its denoiser runs ring
            attention over GPUs.
        TypeError: If no denoiser of the pipeline belongs to a known family, or `preset` is of a wrong type.
        ValueError: If there is no such preset, or an override is wrong.
            Whatever is raised, nothing has been changed.
    """
    found = find_denoisers(pipe)
    before = state_of(pipe).switch
    _check_free(pipe, found, before)
    _, denoiser, family = found[0]
    of_lora = state_of(pipe).default_preset
    if preset is None and of_lora is not None:
        resolved = load_preset(*of_lora, config=config, **overrides)
        title = f"PSA preset {resolved.name!r} of section {of_lora[0]}, which the LoRA was trained with"
    else:
        resolved, title = resolve_preset(preset, config, overrides, family=family, denoiser=denoiser, pipe=pipe)
    # a count of steps that nobody chose for this pipeline gives way where it would leave no sparse step
    is_given = "warmup_steps" in overrides or isinstance(preset, PSAPreset)
    run = Run(resolved, title, report=report, follows=not is_given)
    switch_on(pipe, run, {"preset": preset, "config": config, "report": report, **overrides})
    return pipe


def switch_on(pipe: Any, run: Run, arguments: dict[str, Any]) -> None:
    """Put a run into a pipeline, in the place of the one that may be there; change nothing if that fails.

    Denoisers that have PSA from elsewhere are left alone; `enable_psa` refuses them before.

    Args:
        pipe: The pipeline.
        run: What its processors will share.
        arguments: What `enable_psa` was called with.
    """
    before = state_of(pipe).switch
    found = [entry for entry in find_denoisers(pipe) if not _has_other(entry[1], before)]
    made = {name: _make_processors(denoiser, Site(name, denoiser, family, run)) for name, denoiser, family in found}
    _refuse_ring(run, [processor for processors in made.values() for _, processor in processors])

    # nothing above changes anything, nothing below can fail
    switch = Switch(run, arguments)
    if before is not None:
        _take_off(pipe, before)
    for name, denoiser, _ in found:
        _put_in(switch, denoiser, made[name])
    switch.listener = Listener(pipe, run, before=_bring_up_to_date)
    run.owner = weakref.ref(pipe)
    set_state(pipe, switch=switch)
    names = " and ".join(name for name, _, _ in found)
    count, warmup = len(switch.processors), run.preset.warmup_steps
    logger.info("%s, in %d self-attentions of %s, %d warm-up steps", run.title, count, names, warmup)


def disable_psa(pipe: Any) -> Any:
    """Put back the very processor objects that `enable_psa` found, and take off whatever else of ours is there.

    That is a `PSAProcessor` on a denoiser (diffusers' default processors come instead), and what another pipeline that
    shares a denoiser has enabled. A no-op when PSA is off. A processor that somebody else has set since then stays.

    Args:
        pipe: A pipeline.

    Returns:
        The pipeline itself.
    """
    switch = state_of(pipe).switch
    if switch is not None:
        _take_off(pipe, switch)
    for _, denoiser, family in _denoisers_of(pipe):
        for layer, attention in attention_paths(denoiser).items():
            processor = getattr(attention, "processor", None)
            if isinstance(processor, FamilyProcessor):
                owner = None if processor.site.run.owner is None else processor.site.run.owner()
                if owner is not None and owner is not pipe and _has_put(owner, attention):
                    disable_psa(owner)
                if attention.processor is processor:
                    attention.processor = processor.original
                    if owner is None and processor.site.denoiser() is denoiser:
                        processor.site.leave()
            elif _is_ours(processor):
                attention.processor = family.default_processor(denoiser, layer, attention)
    return pipe


def set_attn_processor(self: Any, processor: Any) -> None:
    """Set the attention processor of the pipeline's denoisers.

    `psa_diffusers` adds this method to diffusers pipelines. A `PSAProcessor` means `enable_psa`; anything else goes to
    the `set_attn_processor` of each denoiser, after PSA is switched off.

    Args:
        processor: A processor, or a dict of processors by name.

    Raises:
        TypeError: If it is no processor, or the pipeline has no denoiser that takes attention processors. Nothing has
            been changed then.
    """
    for each in processor.values() if isinstance(processor, dict) else (processor,):
        if isinstance(each, type):
            raise TypeError(f"set_attn_processor needs a processor, got the class: write {each.__name__}(...)")
        if not callable(each):
            raise TypeError(
                f"set_attn_processor needs a processor, got {each!r}. For a preset write PSAProcessor(preset)"
            )
    if isinstance(processor, PSAProcessor):
        enable_psa(self, processor.preset, config=processor.config, report=processor.report, **processor.overrides)
        return
    names = ("transformer", "transformer_2", "unet")
    denoisers: list[Any] = [getattr(self, name, None) for name in names]
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
    if not isinstance(getattr(pipe, "components", None), dict):
        raise TypeError(f"PSA needs a diffusers pipeline here, got {type(pipe).__name__}")
    found = _denoisers_of(pipe)
    if not found:
        modules = {name: unwrap(part) for name, part in modules_of(pipe).items()}
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in modules.items()) or "no modules"
        known = supported(modules.values())
        raise TypeError(f"PSA knows no denoiser of this {type(pipe).__name__} ({parts}). {known}")
    return found


def _denoisers_of(pipe: Any) -> list[tuple[str, nn.Module, Family]]:
    if not isinstance(getattr(pipe, "components", None), dict):
        return []
    modules = [(name, unwrap(part)) for name, part in modules_of(pipe).items()]
    found = [(name, part, find_family(part)) for name, part in modules]
    return sorted(((name, part, family) for name, part, family in found if family is not None), key=lambda it: it[0])


def _is_ours(processor: Any) -> bool:
    """Whether it came from here; also the class itself, which diffusers takes where it wants an instance."""
    return isinstance(processor, (FamilyProcessor, PSAProcessor)) or processor is PSAProcessor


def _has_put(pipe: Any, attention: Any) -> bool:
    """Whether a pipeline has put a processor into an attention, which somebody may have put elsewhere since."""
    switch = state_of(pipe).switch
    return switch is not None and any(module is attention for module, _ in switch.processors)


def _has_other(denoiser: nn.Module, switch: Switch | None) -> bool:
    """Whether a denoiser has processors of ours that are not of this switch."""
    own = {processor for _, processor in switch.processors} if switch is not None else set()
    processors = [getattr(part, "processor", None) for part in denoiser.modules()]
    return any(_is_ours(processor) and processor not in own for processor in processors)


def _check_free(pipe: Any, found: list[tuple[str, nn.Module, Family]], switch: Switch | None) -> None:
    for name, denoiser, _ in found:
        if _has_other(denoiser, switch):
            raise RuntimeError(
                f"the attentions of {name} have PSA processors already, through another pipeline that shares it or a "
                "PSAProcessor. Call disable_psa on that pipeline, or set the processors of the denoiser back, first"
            )
    if is_running(pipe):
        raise RuntimeError("the pipeline is running: call enable_psa before or after the call, not from a callback")


def _make_processors(denoiser: nn.Module, site: Site) -> list[tuple[Any, FamilyProcessor]]:
    family, made, foreign = site.family, [], set()
    for layer, attention in family.self_attentions(denoiser).items():
        original: Any = attention.processor
        if isinstance(original, FamilyProcessor):
            original = original.original
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


def _put_in(switch: Switch, denoiser: nn.Module, made: list[tuple[Any, FamilyProcessor]]) -> None:
    """Put processors into a denoiser, and listen to its forwards."""
    register_for_guiders(type(processor) for _, processor in made)
    for attention, processor in made:
        attention.processor = processor
    site = made[0][1].site
    switch.processors += made
    switch.sites.append((denoiser, site))
    site.attach(denoiser)


def _take_off(pipe: Any, switch: Switch) -> None:
    """Undo all of a switch."""
    switch.run.switch_off()
    for attention, processor in switch.processors:
        if attention.processor is processor:
            attention.processor = processor.original
    for _, site in switch.sites:
        site.detach()
    set_state(pipe, switch=None)
    if switch.listener is not None:
        switch.listener.stop()


def _bring_up_to_date(pipe: Any) -> None:
    """Before a call: follow what has been exchanged in the pipeline since the last one, and refuse what cannot run."""
    switch = state_of(pipe).switch
    if switch is None:
        return
    _follow_modules(pipe, switch)
    _refuse_ring(switch.run, [processor for _, processor in switch.processors])
    _check_processors(switch)


def _follow_modules(pipe: Any, switch: Switch) -> None:
    """Compare the denoisers by identity: take over new ones, let go of those that are no longer there."""
    now = _denoisers_of(pipe)
    known = {id(denoiser): site for denoiser, site in switch.sites}
    present = {id(denoiser) for _, denoiser, _ in now}
    for denoiser, site in [entry for entry in switch.sites if id(entry[0]) not in present]:
        parts = set(denoiser.modules())
        for attention, processor in [entry for entry in switch.processors if entry[0] in parts]:
            switch.processors.remove((attention, processor))
            if attention.processor is processor:
                attention.processor = processor.original
        site.detach()
        switch.sites.remove((denoiser, site))
        if site.name not in {name for name, _, _ in now}:
            part = unwrap(modules_of(pipe).get(site.name))
            if part is not None:
                logger.warning("PSA does not know the new %s, a %s: it runs dense", site.name, type(part).__name__)
    for name, denoiser, family in now:
        if id(denoiser) in known:
            known[id(denoiser)].name = name  # experts may have changed places
            continue
        if _has_other(denoiser, switch):
            logger.warning("%s is another one since enable_psa, and has PSA of its own, which stays", name)
            continue
        _put_in(switch, denoiser, _make_processors(denoiser, Site(name, denoiser, family, switch.run)))
        logger.info("%s is another one since enable_psa: PSA is on in it too", name)


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


def _refuse_ring(run: Run, processors: list[FamilyProcessor]) -> None:
    configs = [ulysses.context_parallel(processor.original) for processor in processors]
    if run.preset.type != "dense" and any(config is not None and config.ring_degree > 1 for config in configs):
        raise RuntimeError(ulysses.RING)


add_to_pipelines(set_attn_processor)
