"""What the processors of one pipeline share while it runs."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psa_diffusers.pipelines.host import running_pipeline
from psa_diffusers.presets import PSAPreset
from psa_diffusers.processors.calls import Others
from psa_diffusers.processors.clock import WarmupScheduler
from psa_diffusers.processors.place import PlaceReader
from psa_diffusers.processors.recorder import Recorder
from psa_diffusers.processors.reuse import Branch, KeptSchedules

if TYPE_CHECKING:
    from psa_diffusers.processors.site import Site

logger = logging.getLogger("psa_diffusers")


class Run:
    """What the processors of one enabled pipeline share: the preset, the clock, the records, the kept schedules.

    A call of any pipeline that owns a denoiser is a run. The pipeline that PSA was enabled on announces its calls;
    another one that shares the denoiser is found on the stack at its first forward, and announces its calls from then
    on.

    Args:
        preset: What to do in sparse steps.
        title: What was enabled, one line for the report.
        report: Whether to record every call.
        follows: Whether the warm-up of the preset may become a share where its count leaves no sparse step.

    Attributes:
        is_called: Whether a pipeline that announces its calls is running.
        owner: The pipeline that PSA was enabled on, weakly; None for a `PSAProcessor`.
        sites: The denoisers that it listens to.
    """

    def __init__(self, preset: PSAPreset, title: str, *, report: bool, follows: bool = False) -> None:
        self.preset = preset
        self.title = title
        self.clock = WarmupScheduler(preset.warmup_steps, dense_last_steps=preset.dense_last_steps, follows=follows)
        self.recorder = Recorder(title) if report else None
        self.kept = KeptSchedules(preset.refresh_every)
        self.is_on = True
        self.is_called = False
        self.owner: Callable[[], Any] | None = None
        self.ran_sparse = False
        self._was_open = False
        self._place = PlaceReader()
        self._pipe: Callable[[], Any] | None = None
        self.sites: list[Site] = []
        self._others = Others(self)
        self._said: set[str] = set()
        self._why_dense: Counter[str] = Counter()
        self._why_dense_steps: Counter[str] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is asked for the same, and has heard nothing yet."""
        report, follows = self.recorder is not None, self.clock.follows
        return partial(Run, self.preset, self.title, report=report, follows=follows), ()

    @contextmanager
    def call_of(self, pipe: Any) -> Iterator[None]:
        """Begin a run with a call of a pipeline, and end it however that ends. Its records stay until the next one."""
        if self.is_called:
            yield  # a pipeline that calls itself, or another one: the same run
            return
        self._forget()
        self.clock.reset()
        self._place.begin(pipe)
        self._pipe, self.is_called = weakref.ref(pipe), True
        try:
            yield
            self._say_if_nothing_was_sparse()
        finally:
            self.clock.reset()
            self._place.begin(None)
            self.kept.clear()
            self._pipe, self.is_called = None, False

    def switch_off(self) -> None:
        """From now on the processors only forward: somebody may have copies of them."""
        self.is_on = False
        self.kept.clear()
        self._others.stop()

    def hear_step(self, pipe: Any, timestep: Any) -> None:
        """Hear which timestep a pipeline is at, before its denoiser runs."""
        self._read_length(pipe)
        self.clock.at(timestep)

    def before_forward(self, denoiser: nn.Module, timestep: Any, *, rises: bool = False) -> None:
        """Let the clock know that a denoiser is about to run.

        Args:
            denoiser: The denoiser.
            timestep: What it is given as `timestep`.
            rises: Whether that rises from step to step; the clock wants it to fall.
        """
        is_told = self.is_called
        if torch.compiler.is_compiling():
            if not is_told and timestep is not None and self._is_asked():
                self.clock.observe(-timestep if rises else timestep)
            return
        if is_captured(timestep):
            if not self.clock.idle or self.preset.steps:
                self.say(
                    "a CUDA graph is being captured, which repeats this step in every replay: capture one for each "
                    "kind of step, or set warmup_steps=0",
                    "the denoiser",
                    how=f"as in step {self.clock.step}",
                )
            return
        pipe = self._pipe() if self._pipe is not None and is_told else self._find_pipe(denoiser)
        if pipe is not None:
            place = None if self.clock.is_told else self._place.read(pipe)
            self._read_length(pipe)
            if place is not None:
                self.clock.go_to(place.step, is_new=place.is_new)
            if place is not None or self.clock.is_told:
                return
        # reading a timestep waits for the GPU, so only if nobody else tells the step and somebody wants to know it
        if self._is_asked() and timestep is not None and self.clock.observe(-timestep if rises else timestep):
            if pipe is None:
                self._forget()

    def branch(self, denoiser: str, inputs: Mapping[str, Any]) -> Branch | None:
        """Return the guidance branch of the forward that begins; None if nobody asks or its step is not known."""
        is_known = self._pipe is not None or inputs.get("timestep") is not None
        if self.kept.steps == 1 or torch.compiler.is_compiling() or not is_known:
            return None
        return self.kept.branch(denoiser, inputs.get("encoder_hidden_states"), (self.clock.rounds, self.clock.step))

    def say(self, reason: str, layer: str, how: str = "dense") -> None:
        """Log, once a call and reason, why a layer does not run as the user wishes."""
        if reason not in self._said and not torch.compiler.is_compiling():
            self._said.add(reason)
            logger.warning("PSA runs %s %s: %s", layer, how, reason)

    def count_dense(self, reason: str) -> None:
        """Take note of why a call was dense, for the warning at the end of a run without any sparse one."""
        self._why_dense[reason] += 1

    def count_forward(self, why_dense: str) -> None:
        """The same of a whole forward: compiled processors count nothing."""
        self._was_open |= not why_dense
        if why_dense:
            self._why_dense_steps[why_dense] += 1

    def _is_asked(self) -> bool:
        return bool(not self.clock.idle or self.preset.steps or self.recorder is not None or self.kept.steps > 1)

    def _read_length(self, pipe: Any) -> None:
        order = getattr(getattr(pipe, "scheduler", None), "order", 1)
        self.clock.set_length(self._place.read_length(pipe), order)

    def _find_pipe(self, denoiser: nn.Module) -> Any:
        """Find the pipeline that runs the denoiser without having announced it, and listen to it from now on."""
        pipe = running_pipeline(denoiser)
        if pipe is None:
            self._pipe = None
            return None
        if self._pipe is None or self._pipe() is not pipe:
            self._forget()
            self.clock.reset()
            self._place.begin(None)
            self._pipe = weakref.ref(pipe)
            self._others.hear(pipe)
        timestep = getattr(pipe, "_current_timestep", None)
        if timestep is not None:
            self.hear_step(pipe, timestep)
        return pipe

    def _say_if_nothing_was_sparse(self) -> None:
        if self.ran_sparse or self.clock.has_warned or not self.is_on or self.preset.type == "dense":
            return
        if not self._why_dense:  # compiled processors tell nothing
            self._why_dense = self._why_dense_steps
        if not self._why_dense or (self._why_dense is self._why_dense_steps and self._was_open):
            return
        (reason, _), *_ = self._why_dense.most_common(1)
        logger.warning(
            "nothing ran sparse in this call although PSA is on: %s. %s",
            reason,
            "lower warmup_steps"
            if reason == "warm-up"
            else "enable_psa(pipe, report=True) and psa_report(pipe) tell more",
        )

    def _forget(self) -> None:
        self.ran_sparse = self._was_open = False
        self._why_dense, self._why_dense_steps = Counter(), Counter()
        self._said.clear()
        self.kept.clear()
        if self.recorder is not None:
            self.recorder.clear()


def is_captured(x: Any) -> bool:
    """Whether x is a tensor in a CUDA graph that is being captured.

    Such a graph would read a kept schedule after its memory has gone, and its numbers cannot be read at all.
    """
    is_asked = isinstance(x, Tensor) and x.is_cuda and not torch.compiler.is_compiling()
    return is_asked and torch.cuda.is_current_stream_capturing()
