"""The one processor that users hand to diffusers themselves."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from psa_diffusers.models.registry import attention_paths, family_of, find_family, supported
from psa_diffusers.pipelines.host import add_hooks, running_module
from psa_diffusers.presets import PSAPreset
from psa_diffusers.processors.base import signature_of
from psa_diffusers.processors.choice import check_choice, resolve_preset
from psa_diffusers.processors.recorder import Recorder
from psa_diffusers.processors.run import Run
from psa_diffusers.processors.site import Site

logger = logging.getLogger("psa_diffusers")

_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "attention_mask",
    "temb",
    "rotary_emb",
    "image_rotary_emb",
    "query_rotary_emb",
    "key_rotary_emb",
    "perturbation_mask",
    "all_perturbed",
    "sparse_params",
    "original_context_length",
    "image_embed_seq_len",
)
"""The names of all families: diffusers hands over only what a signature names."""


class PSAProcessor:
    """Pyramid sparse attention as one attention processor, for the ways in which diffusers sets processors.

    `pipe.set_attn_processor(PSAProcessor("psa_balanced"))` is `enable_psa(pipe, "psa_balanced")`.
    `pipe.transformer.set_attn_processor(PSAProcessor("psa_balanced"))` works as well: diffusers puts the one object on
    every attention of the denoiser; at the first forward it finds out which denoiser that is, makes the video
    self-attentions sparse and leaves every other attention as diffusers would have it. The denoising step then comes
    from the denoiser's `timestep`, one scalar read per forward if the preset has warm-up steps or `refresh_every`;
    `enable_psa`, which hears of the steps from the pipeline, needs none. To take it back, set the processors you want
    instead.

    One object on the two experts of Wan 2.2 shares one clock, as it should; use different objects for different
    pipelines. Without its pipeline a text-to-video expert looks like Wan 2.1 14B and gets its presets: hand over
    `load_preset("Wan2.2_A14B")` instead of a name.

    Args:
        preset: Name of a preset, a `PSAPreset`, or None for the default of the model.
        config: Path of a YAML with presets of your own.
        report: Whether to record what runs, for `psa_report`.
        **overrides: Preset fields by their YAML names, for example `warmup_steps=0`.

    Raises:
        TypeError: If `preset` is something else.
        ValueError: If no model has a preset of that name, or an override is wrong.
    """

    _attention_backend = None
    _parallel_config = None

    def __new__(cls, *args: Any, **kwargs: Any) -> PSAProcessor:
        """Refuse what diffusers does with a class that was set where it takes a processor: it calls it."""
        if args and isinstance(args[0], nn.Module):
            raise TypeError(
                f"the class {cls.__name__} was set as an attention processor, not an instance: write "
                f"set_attn_processor({cls.__name__}(...))"
            )
        return super().__new__(cls)

    def __init__(
        self,
        preset: str | PSAPreset | None = None,
        *,
        config: str | Path | None = None,
        report: bool = False,
        **overrides: Any,
    ) -> None:
        check_choice(preset, config, overrides)
        self.preset = preset
        self.config = config
        self.report = report
        self.overrides = overrides
        self._runs: dict[PSAPreset, Run] = {}
        self._processors: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self._num_denoisers = 0

    # help() and inspect ask __new__ first
    __new__.__signature__ = inspect.signature(__init__)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy serves the copied denoiser, by a clock and records of its own."""
        return partial(PSAProcessor, self.preset, config=self.config, report=self.report, **self.overrides), ()

    @property
    def recorders(self) -> list[Recorder]:
        """Recorders of the denoisers served, for `psa_report`."""
        return [run.recorder for run in self._runs.values() if run.recorder is not None]

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        processor = self._processors.get(attn)
        if processor is None:
            processor = self._bind(attn)
        elif (site := getattr(processor, "site", None)) is not None and site.is_bound:
            site.look_for_end(attn)
        for name in ("_attention_backend", "_parallel_config"):
            value = getattr(self, name)
            if value is not None and getattr(processor, name, value) != value:
                setattr(processor, name, value)
        return processor(attn, *args, **kwargs)

    __call__.__signature__ = signature_of(_ARGUMENTS)  # type: ignore[attr-defined]

    @torch.compiler.disable  # once a denoiser; it walks the Python stack
    def _bind(self, attn: Any) -> Any:
        """Make the processors of the denoiser that is running, and listen to its forwards from now on."""
        denoiser, args, kwargs = _running_denoiser(attn)
        family = family_of(denoiser)
        preset, title = resolve_preset(self.preset, self.config, self.overrides, family=family, denoiser=denoiser)
        is_given = "warmup_steps" in self.overrides or isinstance(self.preset, PSAPreset)
        run = self._runs.get(preset)
        if run is None or not run.is_on:
            run = self._runs[preset] = Run(preset, title, report=self.report, follows=not is_given)
        self._num_denoisers += 1
        suffix = "" if self._num_denoisers == 1 else f" {self._num_denoisers}"
        site = Site(type(denoiser).__name__ + suffix, denoiser, family, run)

        ours = [part for part in denoiser.modules() if getattr(part, "processor", None) is self]
        paths = {part: path for path, part in attention_paths(denoiser).items()}
        sparse = family.self_attentions(denoiser)
        for part in ours:
            path = paths[part]
            original = family.default_processor(denoiser, path, part)
            self._processors[part] = family.processor(path, original, site) if path in sparse else original

        def before_forward(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if any(part.processor is self for part in ours):
                site.before_forward(denoiser, args, kwargs)
                return
            for handle in handles:  # the user has set other processors since
                handle.remove()
            for part in ours:
                self._processors.pop(part, None)
            run.kept.clear()
            site.leave()

        handles = add_hooks(denoiser, before_forward, site.after_forward)
        site.bind(denoiser, args, kwargs)
        logger.info("%s, in the self-attentions of %s", title, site.name)
        return self._processors[attn]


def _running_denoiser(attn: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Find the denoiser that `attn` is running in, and the inputs of its forward."""
    found = running_module(
        lambda module: find_family(module) is not None and any(part is attn for part in module.modules())
    )
    if found is None:
        raise RuntimeError(
            f"a PSAProcessor was called by a {type(attn).__name__}, but no denoiser that PSA knows is running on the "
            f"Python stack. Use enable_psa(pipe) instead, which is told the denoiser. {supported()}"
        )
    return found
