"""Where a pipeline is that does not tell its timesteps: read from its guiders and its scheduler."""

from __future__ import annotations

from typing import Any, NamedTuple

_GUIDERS = ("guider", "guider_2")


class Place(NamedTuple):
    """A step of a pipeline.

    Attributes:
        step: Its index.
        is_new: Whether the pipeline has gone there since it was last asked, as far as that is known.
    """

    step: int
    is_new: bool = False


class PlaceReader:
    """Reads the step that a pipeline is at, before each forward of its denoisers. Compares no values of timesteps.

    A guider is told its step and its timestep before the forwards of a step. Of several, one an expert, the one that
    was told last counts. A scheduler has an index after its first step only; one that nobody told where it begins
    begins one before that.
    """

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, pipe: Any) -> None:
        """A call begins: what the guiders know is of an earlier one."""
        self._told = {name: guider._timestep for name, guider in _guiders_of(pipe).items()}
        self._guider: Any = None
        self._first: int | None = None
        self._has_begun = False

    def read(self, pipe: Any) -> Place | None:
        """The place of a pipeline; None if neither a guider nor its scheduler knows it."""
        guiders = _guiders_of(pipe)
        now = {name: guider for name, guider in guiders.items() if guider._timestep is not self._told.get(name)}
        self._told |= {name: guider._timestep for name, guider in now.items()}
        if now:
            self._guider = min(now.values(), key=lambda guider: guider._step)
        scheduler: Any = getattr(pipe, "scheduler", None)
        order = getattr(scheduler, "order", 1)
        if self._guider is not None:
            return Place(self._guider._step // order, bool(now))
        if not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        if index is None:
            self._first, self._has_begun = None, True
            return Place(0)
        return Place((index - self._first_index(scheduler, index)) // order)

    def read_length(self, pipe: Any) -> int | None:
        """Evaluations of the denoiser that make the running call, or its segment; None if nobody knows."""
        if (told := getattr(pipe, "num_timesteps", None)) is not None:
            return int(told)
        scheduler: Any = getattr(pipe, "scheduler", None)
        if self._guider is not None and isinstance(self._guider._num_inference_steps, int):
            return int(self._guider._num_inference_steps * getattr(scheduler, "order", 1))
        if getattr(scheduler, "num_inference_steps", None) is None:
            return None  # its timesteps are those of training
        return len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or self._first or 0)

    def _first_index(self, scheduler: Any, index: int) -> int:
        told: int | None = getattr(scheduler, "begin_index", None)
        if told is not None:
            return told
        if self._first is None:
            self._first = index - 1 if self._has_begun else 0
        return self._first


def _guiders_of(pipe: Any) -> dict[str, Any]:
    """Guiders of diffusers that have been told a step."""
    found = {name: getattr(pipe, name, None) for name in _GUIDERS}
    return {name: guider for name, guider in found.items() if isinstance(getattr(guider, "_step", None), int)}
