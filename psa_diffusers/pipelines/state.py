"""What PSA keeps on a pipeline: one typed object behind one accessor."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from psa_diffusers.pipelines.host import Sleeping
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.calls import Listener
from psa_diffusers.processors.recorder import Recorder
from psa_diffusers.processors.run import Run
from psa_diffusers.processors.site import Site

_ATTRIBUTE = "_psa_state"


@dataclass
class Switch:
    """Everything `disable_psa` has to undo.

    Attributes:
        run: What the processors share.
        arguments: What `enable_psa` was called with, by name, to switch on again.
        sites: The denoisers.
        processors: Attention modules and the processors that were put into them.
        listener: Hears the calls of the pipeline.
    """

    run: Run
    arguments: dict[str, Any]
    sites: list[tuple[nn.Module, Site]] = field(default_factory=list)
    processors: list[tuple[Any, FamilyProcessor]] = field(default_factory=list)
    listener: Listener | None = None

    @property
    def recorders(self) -> list[Recorder]:
        """Where the calls are noted, if they are."""
        return [] if self.run.recorder is None else [self.run.recorder]


@dataclass(frozen=True)
class PipelineState:
    """State of one pipeline.

    Attributes:
        switch: What PSA has put into the pipeline; None while PSA is off.
        default_preset: Section and name of the preset that its LoRA was trained with, if it has such a LoRA.
        lora: What a few-step LoRA has set in the pipeline; None without one. The room of LoRAs knows its type.
    """

    switch: Switch | None = None
    default_preset: tuple[str, str] | None = None
    lora: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a pipeline gets a switch of its own: what is kept here belongs to the pipeline that was enabled."""
        switch = None if self.switch is None else (self.switch.run, self.switch.arguments)
        return _SleepingState, (switch, self.default_preset, self.lora)


@dataclass
class _SleepingState(Sleeping):
    switch: tuple[Run, dict[str, Any]] | None
    default_preset: tuple[str, str] | None
    lora: Any

    def wake(self, pipe: Any) -> None:
        from psa_diffusers.pipelines.enable import switch_on

        delattr(pipe, _ATTRIBUTE)
        set_state(pipe, default_preset=self.default_preset)
        if self.lora is not None:
            self.lora.wake(pipe)
        if self.switch is not None:
            switch_on(pipe, *self.switch)


def state_of(pipe: Any) -> PipelineState:
    """Return the state of a pipeline, an empty one where nothing was set."""
    state = getattr(pipe, _ATTRIBUTE, None)
    return state if isinstance(state, PipelineState) else PipelineState()


def set_state(pipe: Any, **changes: Any) -> None:
    """Change fields of a pipeline's state. The attribute goes when the last one is empty again.

    Args:
        pipe: The pipeline.
        **changes: Fields of `PipelineState`.
    """
    state = replace(state_of(pipe), **changes)
    if any(getattr(state, each.name) is not None for each in fields(state)):
        setattr(pipe, _ATTRIBUTE, state)
    elif hasattr(pipe, _ATTRIBUTE):
        delattr(pipe, _ATTRIBUTE)
