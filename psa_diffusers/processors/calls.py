"""Hear the calls of a pipeline: when one begins and ends, and which step its denoiser is about to run."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any

from psa_diffusers.pipelines.host import modules_of, pop_subclass, push_subclass, unwrap

if TYPE_CHECKING:
    from psa_diffusers.processors.run import Run

_STEP = "_current_timestep"  # where diffusers' pipelines keep the timestep that they are at


class Listener:
    """Tells a `Run` what one pipeline does. The pipeline gets a subclass of its class for that.

    Three things are overridden, each passing through what it hears:

    - the call: it begins and ends the run, and hands the clock to the pipeline as `callback_on_step_end`, together with
      a callback of the user's;
    - `progress_bar`, with which every pipeline of diffusers begins its loop over the steps: a segment begins;
    - the attribute in which pipelines keep their timestep: it is set before the denoiser runs, in every step, also
      where the denoiser is compiled and its hooks are not asked.

    Args:
        pipe: The pipeline. Only a weak reference is held.
        run: Who is told.
        before: Called with the pipeline before each of its calls. It may stop the listener.
    """

    def __init__(
        self,
        pipe: Any,
        run: Run,
        before: Callable[[Any], None] | None = None,
    ) -> None:
        self.run = run
        self.before = before
        self._pipe = weakref.ref(pipe)
        cls: Any = type(pipe)
        self._parameters = inspect.signature(cls.__call__)
        overridden = {"__call__": self._make_call(cls)}
        if hasattr(cls, "progress_bar"):
            overridden["progress_bar"] = self._make_progress_bar(cls)
        if not hasattr(cls, _STEP):
            overridden[_STEP] = self._make_step()
        self._subclass: type | None = push_subclass(pipe, overridden)

    def stop(self) -> None:
        """Give the pipeline its class back."""
        pipe, subclass = self._pipe(), self._subclass
        self._subclass = None
        if pipe is not None and subclass is not None:
            pop_subclass(pipe, subclass)

    @property
    def is_needed(self) -> bool:
        """Whether it listens, and its pipeline is alive."""
        return self._subclass is not None and self._pipe() is not None

    def _hears(self, pipe: Any) -> bool:
        """Whether it is this pipeline, and not another one of its class, and we still listen."""
        return self._subclass is not None and self._pipe() is pipe

    def _make_call(self, cls: Any) -> Any:
        listener = self

        # looked up in each call: others (cache-dit) exchange methods of the class
        @functools.wraps(cls.__call__)
        def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if not listener._hears(pipe):
                return cls.__call__(pipe, *args, **kwargs)
            if listener.before is not None:
                listener.before(pipe)
            if not listener._hears(pipe):
                return cls.__call__(pipe, *args, **kwargs)
            with listener.run.call_of(pipe):
                args, kwargs = listener._add_callback(pipe, args, kwargs)
                return cls.__call__(pipe, *args, **kwargs)

        return __call__

    def _add_callback(
        self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = "callback_on_step_end"
        if name not in self._parameters.parameters:
            return args, kwargs
        try:
            bound = self._parameters.bind_partial(pipe, *args, **kwargs)
        except TypeError:
            return args, kwargs  # lets the pipeline complain in its own words
        bound.arguments[name] = _join(bound.arguments.get(name), self.run.clock)
        return bound.args[1:], bound.kwargs

    def _make_progress_bar(self, cls: Any) -> Any:
        listener = self

        @functools.wraps(cls.progress_bar)
        def progress_bar(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if listener._hears(pipe):
                iterable = args[0] if args else kwargs.get("iterable")
                listener.run.clock.begin_loop(len(iterable) if isinstance(iterable, Sized) else None)
            return cls.progress_bar(pipe, *args, **kwargs)

        return progress_bar

    def _make_step(self) -> property:
        listener = self

        def read(pipe: Any) -> Any:
            try:
                return vars(pipe)[_STEP]
            except KeyError:
                raise AttributeError(f"{type(pipe).__name__!r} object has no attribute {_STEP!r}") from None

        def write(pipe: Any, timestep: Any) -> None:
            vars(pipe)[_STEP] = timestep
            if timestep is not None and listener._hears(pipe):
                listener.run.hear_step(pipe, timestep)

        return property(read, write, lambda pipe: vars(pipe).pop(_STEP))


class Others:
    """The pipelines beside the enabled one that run its denoisers, as long as they do.

    Args:
        run: Who is told what they do.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._listeners: list[Listener] = []

    def hear(self, pipe: Any) -> None:
        """Listen to one of them from now on."""
        self._listeners = [each for each in self._listeners if each.is_needed]
        self._listeners.append(Listener(pipe, self.run, before=self._check))

    def stop(self) -> None:
        """Listen to none of them any more."""
        for listener in self._listeners:
            listener.stop()
        self._listeners = []

    def _check(self, pipe: Any) -> None:
        parts = [unwrap(part) for part in modules_of(pipe).values()]
        if not any(site.denoiser() is part for site in self.run.sites for part in parts):
            for listener in self._listeners:
                if listener._hears(pipe):
                    listener.stop()


def _join(theirs: Any, clock: Any) -> Any:
    """Return one callback for both. The user's is called with what it would get without us."""
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    if theirs is None:
        return clock
    if isinstance(theirs, (PipelineCallback, MultiPipelineCallbacks)):
        return MultiPipelineCallbacks([theirs, clock])

    def both(pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        clock(pipeline, step_index, timestep, {})
        return theirs(pipeline, step_index, timestep, callback_kwargs)

    return both
