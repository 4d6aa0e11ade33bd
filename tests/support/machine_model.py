"""What the state machine believes: who makes which denoiser sparse, and what each of its layers does in each step.

Nothing of the package is used here. It is written after the documentation:

- a denoiser is sparse by one switch, that of a pipeline or of a `PSAProcessor` on it, and whoever calls it gets that;
- an enabled pipeline looks at its denoisers before each call: it lets go of those that are not there any more, takes on
  those that nobody makes sparse, and leaves the others alone;
- disabling a pipeline takes off whatever sits on its denoisers;
- copies have a switch of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from machine_pipelines import LAYERS, Choice, Kind

Record = tuple[int, int, str, bool]
"""What a report tells of a call: step, layer, kind, whether the level map is an earlier step's."""


@dataclass(eq=False)
class Switch:
    """What makes denoisers sparse.

    Attributes:
        choice: What was asked for.
        is_standalone: Whether it is a `PSAProcessor` on denoisers.
        listens: Pipelines that it has heard of, beside its own.
        records: What the report must hold.
        alone: Timestep and step of the last forward outside of any pipeline, since the last call.
    """

    choice: Choice
    is_standalone: bool = False
    listens: list[Pipeline] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    alone: tuple[float, int] | None = None

    def forget(self) -> None:
        """A run begins."""
        self.records, self.alone = [], None

    def hear(self, timestep: float) -> None:
        """A forward outside of any pipeline: a smaller timestep is the next step, a greater one another run."""
        if self.alone is None or timestep > self.alone[0]:
            self.forget()
            self.alone = timestep, 0
        else:
            self.alone = timestep, self.alone[1] + (timestep < self.alone[0])


@dataclass(eq=False)
class Denoiser:
    """One denoiser.

    Attributes:
        module: The real one.
        seed: What its weights are made of.
        has_adapter: Whether it has a LoRA.
        switch: What makes it sparse.
        left: What cannot take it on any more, because somebody has set other processors since.
        past: Switches without a pipeline that hear of their end in its next forward.
        originals: The processors that must be back when nothing makes it sparse.
        is_compiled: Whether what it does cannot be seen.
        offload: Who moves its weights, empty if nobody does.
    """

    module: Any
    seed: int
    has_adapter: bool = False
    switch: Switch | None = None
    left: Switch | None = None
    past: list[Switch] = field(default_factory=list)
    originals: dict[str, Any] = field(default_factory=dict)
    is_compiled: bool = False
    offload: str = ""

    @property
    def heard_by(self) -> list[Switch]:
        """Switches that hear of its forwards."""
        return [switch for switch in (self.switch, self.left) if switch is not None]


@dataclass(eq=False)
class Pipeline:
    """One pipeline.

    Attributes:
        real: The real one.
        kind: What it is.
        cls: Its class, as it was before us.
        parts: Its denoisers by name.
        switch: What it was enabled with.
    """

    real: Any
    kind: Kind
    cls: type
    parts: dict[str, Denoiser]
    switch: Switch | None = None


@dataclass
class Forward:
    """What one forward must do: of which denoiser, in which step, and whether each of its layers is sparse."""

    denoiser: Denoiser
    step: int
    layers: list[bool]


class Refused(Exception):
    """The operation must raise an error and change nothing."""


class World:
    """All pipelines and denoisers of a sequence."""

    def __init__(self) -> None:
        self.pipelines: list[Pipeline] = []
        self.denoisers: list[Denoiser] = []

    def enable(self, pipe: Pipeline, choice: Choice) -> None:
        """`enable_psa`."""
        if any(part.switch is not None and part.switch is not pipe.switch for part in pipe.parts.values()):
            raise Refused
        self._take_off(pipe)
        pipe.switch = Switch(choice)
        for part in pipe.parts.values():
            part.switch, part.left = pipe.switch, None

    def disable(self, pipe: Pipeline) -> None:
        """`disable_psa`."""
        self._take_off(pipe)
        for part in pipe.parts.values():
            owner = next((other for other in self.pipelines if other.switch is part.switch), None)
            if part.switch is not None and owner is not None:
                self._take_off(owner)
            elif part.switch is not None:
                self._let_go(part)

    def set_standalone(self, denoisers: list[Denoiser], choice: Choice) -> None:
        """One `PSAProcessor` on denoisers."""
        switch = Switch(choice, is_standalone=True)
        for denoiser in denoisers:
            self._replace(denoiser)
            denoiser.switch = switch

    def set_default(self, denoiser: Denoiser) -> None:
        """Somebody sets diffusers' own processors."""
        self._replace(denoiser)

    def delete(self, pipe: Pipeline) -> None:
        """`del pipe`. What it has enabled goes on where others use it."""
        self.pipelines.remove(pipe)
        for denoiser in self.denoisers:
            if pipe.switch is not None and denoiser.left is pipe.switch:
                denoiser.left = None
                denoiser.past.append(pipe.switch)

    def copy(self, pipe: Pipeline) -> tuple[Switch | None, dict[str, Switch | None]]:
        """Switches of a copy, and of its denoisers."""
        own = None if pipe.switch is None else Switch(pipe.switch.choice)
        switches: dict[int, Switch] = {}
        parts: dict[str, Switch | None] = {}
        for name, part in pipe.parts.items():
            if part.switch is not None and part.switch.is_standalone:
                parts[name] = switches.setdefault(id(part.switch), Switch(part.switch.choice, is_standalone=True))
            else:
                parts[name] = own
        return own, parts

    def begin(self, pipe: Pipeline) -> None:
        """A call of a pipeline begins: it looks at its denoisers."""
        heard = [switch for part in pipe.parts.values() for switch in (*part.heard_by, *part.past)]
        for other in self.listeners(pipe):
            if other in heard:
                other.forget()
            elif other is not pipe.switch:
                other.listens.remove(pipe)
        switch = pipe.switch
        if switch is None:
            return
        switch.forget()
        present = list(pipe.parts.values())
        for denoiser in self.denoisers:
            if denoiser not in present:
                if denoiser.switch is switch:
                    denoiser.switch = None
                if denoiser.left is switch:
                    denoiser.left = None
        for denoiser in present:
            if denoiser.switch is None and denoiser.left is not switch:
                denoiser.switch = switch

    def forwards(self, pipe: Pipeline, num_steps: int, passes: int, parts: list[str]) -> Iterator[Forward]:
        """The forwards of a call one by one, each as the switches are when its step begins.

        Args:
            pipe: The pipeline.
            num_steps: Denoising steps of the call.
            passes: Forwards in a step.
            parts: Which denoiser runs in each step.
        """
        begun: list[Switch] = []
        made: dict[Any, int] = {}
        for step in range(num_steps):
            denoiser = pipe.parts[parts[step]]
            denoiser.past.clear()
            switch = denoiser.switch
            for each in denoiser.heard_by:
                if each not in begun:
                    begun.append(each)
                    each.forget()
                    if pipe.switch is not each and pipe not in each.listens:
                        each.listens.append(pipe)
            for number in range(passes):
                layers = []
                for layer in range(LAYERS):
                    is_sparse = switch is not None and switch.choice.is_sparse(layer, step, num_steps)
                    layers.append(is_sparse)
                    key, is_kept = (denoiser, number, layer), False
                    if switch is not None and is_sparse:
                        is_kept = key in made and step - made[key] < switch.choice.refresh
                        if not is_kept:
                            made[key] = step
                    if switch is not None:
                        switch.records.append((step, layer, "sparse" if is_sparse else "dense", is_kept))
                yield Forward(denoiser, step, layers)

    def forward(self, denoiser: Denoiser, timestep: float) -> Forward:
        """A forward outside of any pipeline: the timestep alone tells the step."""
        denoiser.past.clear()
        for each in denoiser.heard_by:
            each.hear(timestep)
        switch = denoiser.switch
        if switch is None or switch.alone is None:
            return Forward(denoiser, 0, [False] * LAYERS)
        step = switch.alone[1]
        layers = [switch.choice.is_sparse(layer, step, None) for layer in range(LAYERS)]
        switch.records += [(step, layer, "sparse" if layers[layer] else "dense", False) for layer in range(LAYERS)]
        return Forward(denoiser, step, layers)

    def listeners(self, pipe: Pipeline) -> list[Switch]:
        """Switches that listen to a pipeline."""
        switches = [denoiser.switch for denoiser in self.denoisers]
        switches += [past for denoiser in self.denoisers for past in denoiser.past]
        switches += [other.switch for other in self.pipelines]
        heard = (switch for switch in switches if switch and (pipe in switch.listens or pipe.switch is switch))
        return list(dict.fromkeys(heard))

    def _take_off(self, pipe: Pipeline) -> None:
        switch, pipe.switch = pipe.switch, None
        if switch is None:
            return
        switch.listens.clear()
        for denoiser in self.denoisers:
            if denoiser.switch is switch:
                denoiser.switch = None
            if denoiser.left is switch:
                denoiser.left = None

    def _let_go(self, denoiser: Denoiser) -> None:
        switch, denoiser.switch = denoiser.switch, None
        assert switch is not None
        if switch.is_standalone:
            denoiser.past.append(switch)

    def _replace(self, denoiser: Denoiser) -> None:
        """Other processors are set: whoever had the denoiser knows it, and does not take it on again."""
        switch, denoiser.switch = denoiser.switch, None
        if switch is not None and any(pipe.switch is switch for pipe in self.pipelines):
            denoiser.left = switch
        elif switch is not None:
            denoiser.past.append(switch)
