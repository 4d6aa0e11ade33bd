"""What the processors of one pipeline share while it runs, and what they learn of each forward of its denoisers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.registry import Family, Grid
from psa_diffusers.presets import PSAPreset
from psa_diffusers.processors.clock import WarmupScheduler
from psa_diffusers.processors.recorder import Recorder
from psa_diffusers.processors.reuse import Branch, KeptSchedules

if TYPE_CHECKING:
    from psa_diffusers.processors.sparse import SparseCalls

logger = logging.getLogger("psa_diffusers")


class Run:
    """What the processors of one enabled pipeline share: the preset, the clock, the records, the kept schedules.

    Args:
        preset: What to do in sparse steps.
        title: What was enabled, one line for the report.
        report: Whether to record every call.
    """

    def __init__(self, preset: PSAPreset, title: str, *, report: bool) -> None:
        self.preset = preset
        self.clock = WarmupScheduler(preset.warmup_steps, dense_last_steps=preset.dense_last_steps)
        self.recorder = Recorder(title) if report else None
        self.kept = KeptSchedules(preset.refresh_every)
        self.is_on = True
        self.pipe: Any = None
        self.fed_by_callback = False
        self._said: set[str] = set()

    def begin(self, pipe: Any, *, fed_by_callback: bool) -> None:
        """Start a call of a pipeline."""
        self._forget()
        self.clock.reset()
        self.pipe, self.fed_by_callback = pipe, fed_by_callback

    def end(self) -> None:
        """End the call, however it ended. Its records stay until the next one."""
        self.clock.reset()
        self.kept.clear()
        self.pipe, self.fed_by_callback = None, False

    def switch_off(self) -> None:
        """From now on the processors only forward: somebody may have copies of them."""
        self.is_on = False
        self.kept.clear()

    def before_forward(self, timestep: Any, *, rises: bool = False) -> None:
        """Let the clock know that a denoiser is about to run.

        Args:
            timestep: What it is given as `timestep`.
            rises: Whether that rises from step to step; the clock wants it to fall.
        """
        if self.pipe is not None and not torch.compiler.is_compiling():
            self.clock.set_length(getattr(self.pipe, "num_timesteps", None))
        # reading a timestep waits for the GPU, so only if nobody else tells the step and somebody wants to know it
        is_asked = not self.clock.idle or self.preset.steps or self.recorder is not None or self.kept.steps > 1
        if is_captured(timestep):
            if not self.clock.idle or self.preset.steps:
                self.say(
                    "a CUDA graph is being captured, which repeats this step in every replay: capture one for each "
                    "kind of step, or set warmup_steps=0",
                    "the denoiser",
                    how=f"as in step {self.clock.step}",
                )
        elif is_asked and not self.fed_by_callback and timestep is not None:
            is_new_run = self.clock.observe(-timestep if rises else timestep)
            if is_new_run:
                self._forget()

    def branch(self, denoiser: str, inputs: Mapping[str, Any]) -> Branch | None:
        """Return the guidance branch of the forward that begins; None if nobody asks or its step is not known."""
        is_known = self.fed_by_callback or inputs.get("timestep") is not None
        if self.kept.steps == 1 or torch.compiler.is_compiling() or not is_known:
            return None
        return self.kept.branch(denoiser, inputs.get("encoder_hidden_states"), (self.clock.rounds, self.clock.step))

    def say(self, reason: str, layer: str, how: str = "dense") -> None:
        """Log, once a call and reason, why a layer does not run as the user wishes."""
        if reason not in self._said and not torch.compiler.is_compiling():
            self._said.add(reason)
            logger.warning("PSA runs %s %s: %s", layer, how, reason)

    def _forget(self) -> None:
        self._said.clear()
        self.kept.clear()
        if self.recorder is not None:
            self.recorder.clear()


class Site:
    """One denoiser of a `Run`: before each forward it reads from the inputs what the processors need.

    Holds no reference to the denoiser.

    Attributes:
        name: Name in the pipeline.
        family: What is known of its architecture.
        run: The run it belongs to.
        grid: Token grid of the forward that is running, None if its inputs do not tell.
        text_lengths: Valid text tokens of each sample, ``[B]`` integers on the CPU, where the family has padded text.
        branch: Where the schedules of that forward are kept, None if they are not.
    """

    def __init__(self, name: str, denoiser: nn.Module, family: Family, run: Run) -> None:
        self.name = name
        self.family = family
        self.run = run
        self.grid: Grid | None = None
        self.text_lengths: Tensor | None = None
        self.branch: Branch | None = None
        self._layers = list(family.self_attentions(denoiser))
        # that of the class splits the video tokens, and nothing else, as the processors expect
        self.has_parallel_plan = getattr(type(denoiser), "_cp_plan", None) is not None
        self._processors: list[SparseCalls] = []
        self._config = denoiser.config
        # of the class: an instance's forward may be wrapped by offloading
        self._names = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]

    def before_forward(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Torch's forward pre-hook with keyword arguments. Only shapes are read: tensors may be elsewhere still."""
        inputs = {**dict(zip(self._names, args)), **kwargs}  # noqa: B905 - fewer positional arguments than names
        self.grid = self.family.read_grid(self._config, inputs)
        if self.family.read_text is not None:
            self.text_lengths = self.family.read_text(self._config, inputs)
        self.run.before_forward(inputs.get("timestep"), rises=self.family.timesteps_rise)
        self.branch = self.run.branch(self.name, inputs)
        if self.run.preset.steps:
            for processor in self._processors:
                processor.preset = self._preset_now(processor.layer)

    def join(self, processor: SparseCalls) -> PSAPreset:
        """Take note of a processor; return what it has to do in the first step."""
        self._processors.append(processor)
        return self._preset_now(processor.layer)

    def _preset_now(self, layer: str) -> PSAPreset:
        clock, place = self.run.clock, self._layers.index(layer)
        return self.run.preset.at(clock.step, clock.num_steps, place, len(self._layers))


def is_captured(x: Any) -> bool:
    """Whether x is a tensor in a CUDA graph that is being captured.

    Such a graph would read a kept schedule after its memory has gone, and its numbers cannot be read at all.
    """
    is_asked = isinstance(x, Tensor) and x.is_cuda and not torch.compiler.is_compiling()
    return is_asked and torch.cuda.is_current_stream_capturing()
