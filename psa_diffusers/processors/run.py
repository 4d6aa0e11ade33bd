"""What the processors of one pipeline share while it runs, and what they learn of each forward of its denoisers."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from psa_diffusers.models.registry import Family, Grid, find_family
from psa_diffusers.pipelines.host import (
    Handle,
    add_hooks,
    in_backward,
    refuse_impossible,
    running_module,
    running_pipeline,
    wrap_checkpointing,
)
from psa_diffusers.presets import PSAPreset
from psa_diffusers.processors.calls import Listener
from psa_diffusers.processors.clock import WarmupScheduler
from psa_diffusers.processors.place import PlaceReader
from psa_diffusers.processors.recorder import Recorder
from psa_diffusers.processors.reuse import Branch, KeptSchedules

if TYPE_CHECKING:
    from psa_diffusers.processors.sparse import SparseCalls

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
    """

    def __init__(self, preset: PSAPreset, title: str, *, report: bool, follows: bool = False) -> None:
        self.preset = preset
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
        self._others: list[Listener] = []
        self._said: set[str] = set()
        self._why_dense: Counter[str] = Counter()
        self._why_dense_steps: Counter[str] = Counter()

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
        for listener in self._others:
            listener.stop()
        self._others = []

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
            self._others.append(Listener(pipe, self))
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


class Forward(NamedTuple):
    """What is known of one forward of a denoiser. It ends with the forward; a recomputation gets it back.

    Attributes:
        grid: Token grid, None if the inputs do not tell.
        context: Tokens that stand before the grid, None where the family's rule holds.
        text_lengths: Valid text tokens of each sample.
        branch: Where schedules are kept.
        dense: Why the step is dense, empty if it is not.
        presets: What each processor has to do, where that changes from step to step.
    """

    grid: Grid | None
    context: int | None
    text_lengths: Tensor | None
    branch: Branch | None
    dense: str
    presets: tuple[PSAPreset, ...]


class Site:
    """One denoiser of a `Run`: before each forward it reads from the inputs what the processors need.

    Holds no reference to the denoiser.

    Attributes:
        name: Name in the pipeline.
        family: What is known of its architecture.
        run: The run it belongs to.
        is_running: Whether a forward of the denoiser has begun and not ended. The attributes below are of that forward.
        grid: Token grid, None if the inputs of the forward do not tell.
        sizes: The grid as a tensor on the CPU ``[3]``: an input of compiled code, where a tuple would be a constant.
        context: Tokens that stand before the grid, None where the family's rule holds.
        text_lengths: Valid text tokens of each sample, ``[B]`` integers on the CPU, where the family has padded text.
        branch: Where the schedules of the forward are kept, None if they are not.
        dense: Why the step that is running is dense, empty if it is not.
        bound_in: The forward that was running when the site was made, if its first block may be run again.
        is_bound: Whether that forward may be running still: it had no hooks when it began, so torch may not tell its
            end.
    """

    def __init__(self, name: str, denoiser: nn.Module, family: Family, run: Run) -> None:
        self.name = name
        self.family = family
        self.run = run
        self._layers = list(family.self_attentions(denoiser))
        # that of the class splits the video tokens, and nothing else, as the processors expect
        self.has_parallel_plan = getattr(type(denoiser), "_cp_plan", None) is not None
        self._processors: list[SparseCalls] = []
        self._config = denoiser.config
        # of the class: an instance's forward may be wrapped by offloading
        self._names = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._handles: list[Handle] = []
        self.bound_in: Forward | None = None
        self.is_bound = False
        self.is_running = False
        self.grid: Grid | None = None
        self.sizes: Tensor | None = None
        self.context: int | None = None
        self.text_lengths: Tensor | None = None
        self.branch: Branch | None = None
        self.dense = ""

    def attach(self, denoiser: nn.Module) -> None:
        """Listen to the forwards of the denoiser."""
        self._handles += add_hooks(denoiser, refuse_impossible)
        self._handles += add_hooks(denoiser, self.before_forward, self.after_forward)

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def before_forward(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Torch's forward pre-hook with keyword arguments. Only shapes are read: tensors may be elsewhere still."""
        inputs = {**dict(zip(self._names, args)), **kwargs}  # noqa: B905 - fewer positional arguments than names
        self.grid = self.family.read_grid(self._config, inputs)
        self.sizes = None if self.grid is None else torch.tensor(self.grid)
        self.context = None if self.family.read_context is None else self.family.read_context(self._config, inputs)
        if self.family.read_text is not None:
            self.text_lengths = self.family.read_text(self._config, inputs)
        self.run.before_forward(denoiser, inputs.get("timestep"), rises=self.family.timesteps_rise)
        self.branch = self.run.branch(self.name, inputs)
        self.dense = self.run.clock.reason
        self.run.count_forward(self.dense)
        if self.run.preset.steps:
            for processor in self._processors:
                processor.preset = self._preset_now(processor.layer)
        self.is_running, self.is_bound = True, False
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._remember_for_recomputation(denoiser)

    def bind(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Learn of a forward that has begun already: its first block was not put into a context that runs again."""
        self.before_forward(denoiser, args, kwargs)
        self.is_bound = True
        if torch.is_grad_enabled():
            self.bound_in = self._now()

    def look_for_end(self, attention: nn.Module) -> None:
        """End the forward in which the site was made, if the denoiser of an attention that is called is not running."""
        if torch.compiler.is_compiling():
            return
        if not running_module(lambda module: find_family(module) is not None and attention in set(module.modules())):
            self._forget()

    def after_forward(self, *_: Any) -> None:
        """Torch's forward hook, also after an exception: nothing of this forward is left to another one."""
        self._forget()

    def join(self, processor: SparseCalls) -> PSAPreset:
        """Take note of a processor; return what it has to do in the first step."""
        self._processors.append(processor)
        return self._preset_now(processor.layer)

    def _preset_now(self, layer: str) -> PSAPreset:
        clock, place = self.run.clock, self._layers.index(layer)
        return self.run.preset.at(clock.step, clock.num_steps, place, len(self._layers))

    def _forget(self) -> None:
        self.is_running = self.is_bound = False
        self.grid = self.sizes = self.context = self.text_lengths = self.branch = None
        self.dense = ""

    def _remember_for_recomputation(self, denoiser: nn.Module) -> None:
        """Let gradient checkpointing, which runs blocks again in the backward, run them under what is known now."""
        now = self._now()
        if (handle := wrap_checkpointing(denoiser, lambda: self._as_in(now))) is not None:
            self._handles.append(handle)

    def _now(self) -> Forward:
        presets = tuple(processor.preset for processor in self._processors) if self.run.preset.steps else ()
        return Forward(self.grid, self.context, self.text_lengths, None, self.dense, presets)

    @contextmanager
    def as_bound(self) -> Iterator[None]:
        """Run the first block again as it ran in the forward in which the site was made; once, and in a backward."""
        forward = self.bound_in
        if forward is None or not in_backward():
            yield
            return
        self.bound_in = None
        with self._as_in(forward):
            yield

    @contextmanager
    def _as_in(self, forward: Forward) -> Iterator[None]:
        if self.is_running and not (self.is_bound and in_backward()):  # the forward itself
            yield
            return
        presets = [processor.preset for processor in self._processors]
        self.grid, self.context, self.text_lengths, self.branch, self.dense, then = forward
        self.sizes = None if self.grid is None else torch.tensor(self.grid)
        self.is_running, self.is_bound = True, False
        try:
            for processor, preset in zip(self._processors, then, strict=False):
                processor.preset = preset
            yield
        finally:
            for processor, preset in zip(self._processors, presets, strict=True):
                processor.preset = preset
            self._forget()


def is_captured(x: Any) -> bool:
    """Whether x is a tensor in a CUDA graph that is being captured.

    Such a graph would read a kept schedule after its memory has gone, and its numbers cannot be read at all.
    """
    is_asked = isinstance(x, Tensor) and x.is_cuda and not torch.compiler.is_compiling()
    return is_asked and torch.cuda.is_current_stream_capturing()
