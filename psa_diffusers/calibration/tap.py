"""Listen to the self-attentions of a running pipeline: q, k and v as they enter them."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.registry import Grid
from psa_diffusers.pipelines.enable import find_denoisers
from psa_diffusers.presets import PSAPreset
from psa_diffusers.processors.clock import WarmupScheduler
from psa_diffusers.processors.run import Run
from psa_diffusers.processors.site import Site
from psa_diffusers.processors.sparse import Place

__all__ = ["Call", "IsWanted", "Sink", "Tape", "tap_qkv"]

logger = logging.getLogger("psa_diffusers")


@dataclass(frozen=True)
class Call:
    """Which call of a self-attention it is.

    Attributes:
        call: Call of the pipeline, from 0.
        step: Denoising step, from 0.
        num_steps: Steps of the run, None if the pipeline does not tell.
        timestep: What the denoiser was given as `timestep`, the largest of several.
        denoiser: Name in the pipeline.
        layer: Index among the self-attentions of the denoiser.
        num_layers: Number of those.
        forward: Forward of the denoiser within the step, from 0: with guidance, Wan has two.
        grid: Frames, height, width in tokens.
        text_tokens: Text tokens in the sequence.
        text_first: Whether they stand before the video.
        scale: Softmax scale.
        sample: Which sample of how many. Texts of different lengths are recorded one by one; else None.
    """

    call: int
    step: int
    num_steps: int | None
    timestep: float
    denoiser: str
    layer: int
    num_layers: int
    forward: int
    grid: Grid
    text_tokens: int
    text_first: bool
    scale: float
    sample: tuple[int, int] | None = None


IsWanted = Callable[[int, int | None, int, int], bool]
"""`(step, num_steps, layer, num_layers)` to whether that call is wanted; asked before any cost."""

Sink = Callable[[Tensor, Tensor, Tensor, Call], None]
"""Gets q, k, v `[B, H, L, D]`, which it must not change, and the `Call`."""


@contextmanager
def tap_qkv(pipe: Any, is_wanted: IsWanted, sink: Sink) -> Iterator[Tape]:
    """Hand q, k, v of the self-attentions to a function while the pipeline runs inside the context.

    What the pipeline computes does not change. Compiled denoisers run without their compiled code meanwhile.

    Args:
        pipe: A pipeline with a denoiser of a known family.
        is_wanted: Which calls are wanted.
        sink: Who gets them.

    Yields:
        What is known of the run, as it goes on.
    """
    tape = Tape(pipe, is_wanted, sink)
    hooks = []
    found = find_denoisers(pipe)
    try:
        for name, denoiser, family in found:
            site = Site(name, denoiser, family, tape.run)
            hooks.append(denoiser.register_forward_pre_hook(_forward_hook(tape, site), with_kwargs=True))
            attentions = family.self_attentions(denoiser)
            for index, (layer, attention) in enumerate(attentions.items()):
                tap = _LayerTap(tape, site, denoiser, layer, attention, index, len(attentions))
                hooks.append(attention.register_forward_pre_hook(tap.listen, with_kwargs=True))
        # compiled code would not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield tape
    finally:
        for hook in hooks:
            hook.remove()
        # the run has listened to the pipeline, which gets its class back
        tape.run.switch_off()


class Tape:
    """What is known of the calls of a pipeline that is listened to.

    Attributes:
        run: What the processors of the taps share. It decides nothing: they never attend.
        clock: The running step: that of the run, which the pipeline tells, or read from the timesteps of the denoisers
            where no pipeline does.
        timestep: What the denoiser that runs was given.
        calls: Calls of the pipeline so far.
        forwards: Forwards by (call of the pipeline, step, denoiser).
        left_out: Reasons why wanted calls could not be read.
    """

    def __init__(self, pipe: Any, is_wanted: IsWanted, sink: Sink) -> None:
        self.pipe = pipe
        self.is_wanted = is_wanted
        self.sink = sink
        self.run = Run(PSAPreset(), "recording", report=False)
        self._observing = WarmupScheduler()
        self.clock = self._observing
        self._rounds = 0
        self.timestep = 0.0
        self.calls = 0
        self.forwards: Counter[tuple[int, int, str]] = Counter()
        self.left_out: list[str] = []

    def begin_forward(self, denoiser: str, timestep: Any, *, rises: bool) -> None:
        """Take note that a denoiser is about to run.

        Args:
            denoiser: Its name.
            timestep: What it is given as `timestep`.
            rises: Whether that rises from step to step; the clock wants it to fall.
        """
        self.timestep = float(timestep.max() if hasattr(timestep, "max") else timestep)
        if self.run.clock.is_told:
            # half precision may round two timesteps to one value; the pipeline knows them apart
            self.clock = self.run.clock
            self.calls += self.clock.rounds != self._rounds
            self._rounds = self.clock.rounds
        else:
            self.clock = self._observing
            self.clock.set_length(getattr(self.pipe, "num_timesteps", None))
            self.calls += self.clock.observe(-timestep if rises else timestep)
        self.forwards[self.calls - 1, self.clock.step, denoiser] += 1

    def place(self, denoiser: str) -> dict[str, Any]:
        """Return the fields of a `Call` that all self-attentions of the running forward share."""
        call, step = self.calls - 1, self.clock.step
        return {
            "call": call,
            "step": step,
            "num_steps": self.clock.num_steps,
            "timestep": self.timestep,
            "denoiser": denoiser,
            "forward": self.forwards[call, step, denoiser] - 1,
        }


def _forward_hook(tape: Tape, site: Site) -> Callable[..., None]:
    """Make torch's forward pre-hook of a denoiser, with keyword arguments."""

    def before_forward(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        site.before_forward(denoiser, args, kwargs)
        tape.begin_forward(site.name, site.inputs(args, kwargs)["timestep"], rises=site.family.timesteps_rise)

    return before_forward


class _LayerTap:
    """One self-attention that is listened to: a processor of its family makes q, k, v, and hands them over.

    Args:
        tape: Where they go.
        site: The denoiser's site.
        denoiser: The denoiser.
        layer: Module path of the attention in it.
        attention: The attention.
        index: Which self-attention of the denoiser it is.
        count: How many there are.
    """

    def __init__(
        self, tape: Tape, site: Site, denoiser: nn.Module, layer: str, attention: nn.Module, index: int, count: int
    ) -> None:
        self._tape, self._site, self._denoiser = tape, site, denoiser
        self._index, self._count = index, count
        family = site.family
        original = family.default_processor(denoiser, layer, attention)
        self._processor = family.processor(layer, original, site, tap=self)
        # diffusers drops what a processor does not name
        self._names = inspect.signature(type(self._processor).__call__).parameters

    @torch.no_grad()
    def listen(self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Torch's forward pre-hook of the attention, with keyword arguments. Changes nothing."""
        clock, processor = self._tape.clock, self._processor
        if self._tape.is_wanted(clock.step, clock.num_steps, self._index, self._count):
            # anew: the attention may have been fused since
            processor.original = self._site.family.default_processor(self._denoiser, processor.layer, attention)
            processor(attention, *args, **{name: value for name, value in kwargs.items() if name in self._names})

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> None:
        """Deliver what enters the attention."""
        call = Call(
            **self._tape.place(self._site.name),
            layer=self._index,
            num_layers=self._count,
            **place._asdict(),
            scale=q.shape[-1] ** -0.5,
        )
        self._tape.sink(q, k, v, call)

    def left_out(self, reason: str, layer: str) -> None:
        """Note why a call could not be read, each reason once."""
        if reason not in self._tape.left_out:
            self._tape.left_out.append(reason)
            logger.warning("a recording leaves %s out: %s", layer, reason)
