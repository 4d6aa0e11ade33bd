"""The call of a pipeline while PSA is on: it begins and ends the run and hands the clock to the pipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from psa_diffusers.pipelines.state import Switch, state_of
from psa_diffusers.processors.clock import WarmupScheduler


def call_with_clock(cls: type, check: Callable[[Switch], None]) -> Any:
    """Make the `__call__` of a subclass of a pipeline class that feeds the clock.

    Args:
        cls: Class of the pipeline.
        check: Called with the pipeline's switch before the pipeline runs.
    """
    below: Any = cls.__call__
    parameters = inspect.signature(below)
    takes_callback = "callback_on_step_end" in parameters.parameters

    @functools.wraps(below)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        switch = state_of(self).switch
        if switch is None or switch.call is not __call__:
            return below(self, *args, **kwargs)
        check(switch)
        switch.run.begin(self, fed_by_callback=takes_callback)
        try:
            if takes_callback:
                try:
                    bound = parameters.bind_partial(self, *args, **kwargs)
                except TypeError:
                    return below(self, *args, **kwargs)  # lets the pipeline complain in its own words
                theirs = bound.arguments.get("callback_on_step_end")
                bound.arguments["callback_on_step_end"] = _join(theirs, switch.run.clock)
                args, kwargs = bound.args[1:], bound.kwargs
            return below(self, *args, **kwargs)
        finally:
            switch.run.end()

    return __call__


def _join(theirs: Any, clock: WarmupScheduler) -> Any:
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
