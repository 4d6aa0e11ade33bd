"""What the processors of one denoiser learn of each of its forwards."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from psa_diffusers.models.registry import Family, Grid, Placed, find_family
from psa_diffusers.pipelines.host import (
    Handle,
    add_hooks,
    in_backward,
    refuse_impossible,
    running_module,
    wrap_checkpointing,
)
from psa_diffusers.presets import PSAPreset
from psa_diffusers.processors.reuse import Branch
from psa_diffusers.processors.run import Run

if TYPE_CHECKING:
    from psa_diffusers.processors.sparse import SparseCalls


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

    Keeps no denoiser alive.

    Attributes:
        name: Name in the pipeline.
        family: What is known of its architecture.
        run: The run it belongs to.
        denoiser: The denoiser, weakly.
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
        self.denoiser = weakref.ref(denoiser)
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
        run.sites.append(self)

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
        if self in self.run.sites:
            self.run.sites.remove(self)

    def leave(self) -> None:
        """Stop listening where nobody is left to say so: the run ends with its last denoiser."""
        self.detach()
        if all(site.denoiser() is None for site in self.run.sites):
            self.run.switch_off()

    def before_forward(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Torch's forward pre-hook with keyword arguments. Only shapes are read: tensors may be elsewhere still."""
        if self.run.owner is not None and self.run.owner() is None and self._is_left(denoiser):
            self.leave()
            return
        inputs = self.inputs(args, kwargs)
        found = self.family.read_grid(self._config, inputs)
        self.grid, self.context = found if isinstance(found, Placed) else (found, None)
        self.sizes = None if self.grid is None else torch.tensor(self.grid)
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

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a forward of the denoiser was called with, by name."""
        return {**dict(zip(self._names, args)), **kwargs}  # noqa: B905 - fewer positional arguments than names

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

    def _is_left(self, denoiser: nn.Module) -> bool:
        """Whether somebody has set other processors on all of the denoiser."""
        return not any(getattr(part, "processor", None) in self._processors for part in denoiser.modules())

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
