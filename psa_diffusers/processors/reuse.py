"""Schedules that serve for several denoising steps: where they wait, and when they are too old."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psa_diffusers.ops.types import Schedule

Now = tuple[int, int]
"""Round of the clock, and step within it."""

MOST_BRANCHES = 8
"""Forwards whose schedules are kept at once. Without a bound, a denoiser that is called again and again at one timestep
would fill the memory."""


class KeptSchedules:
    """Schedules of the sparse calls of a run, kept for some denoising steps by denoiser, guidance branch and layer.

    Args:
        steps: Denoising steps that a schedule serves, with the one in which it was made; 1 keeps nothing.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._branches: list[Branch] = []

    def clear(self) -> None:
        """Drop all; a run begins or is over."""
        for branch in self._branches:
            branch.clear()  # the denoiser's site still has the last one
        self._branches = []

    def branch(self, denoiser: str, text: Any, now: Now) -> Branch:
        """Return the guidance branch that a forward belongs to, without what has become too old.

        Branches are told apart by the memory of their text, which the pipeline makes once a run. Forwards of one step
        with the same text, or with none, are told apart by their order. What a forward beyond `MOST_BRANCHES` makes is
        dropped when the next one begins.

        Args:
            denoiser: Its name.
            text: What it is given as `encoder_hidden_states`.
            now: The running step.
        """
        for branch in self._branches[MOST_BRANCHES:]:
            branch.clear()
        del self._branches[MOST_BRANCHES:]
        for branch in self._branches:
            branch.drop_old(now, self.steps)
        self._branches = [branch for branch in self._branches if branch.kept or branch.now == now]
        for branch in self._branches:
            if branch.denoiser == denoiser and _are_same(branch.text, text) and branch.now != now:
                branch.begin(now)
                return branch
        self._branches.append(Branch(denoiser, text, now))
        return self._branches[-1]


@dataclass(frozen=True, eq=False)
class _Kept:
    """A schedule, when it was made, and for which calls."""

    schedule: Schedule
    made: Now
    shape: tuple[Any, ...]


class Branch:
    """One forward of a step: what its self-attentions read in the last one of its kind.

    Args:
        denoiser: Name of the denoiser.
        text: Its text. Held, so that its memory cannot become that of another text.
        now: The running step.
    """

    def __init__(self, denoiser: str, text: Any, now: Now) -> None:
        self.denoiser = denoiser
        self.text = text
        self.kept: dict[tuple[str, int], _Kept] = {}
        self.begin(now)

    def begin(self, now: Now) -> None:
        """Begin the forward of a step."""
        self.now = now
        self._calls: Counter[str] = Counter()

    def clear(self) -> None:
        """Drop all."""
        self.text = None
        self.kept = {}

    def drop_old(self, now: Now, steps: int) -> None:
        """Drop what was made in another round of the clock, so many steps ago or more, or in a step to come."""
        (number, step), kept = now, self.kept
        self.kept = {
            place: entry
            for place, entry in kept.items()
            if entry.made[0] == number and 0 <= step - entry.made[1] < steps
        }

    def attend(
        self, layer: str, shape: tuple[Any, ...], attention: Callable[[Schedule | None], tuple[Tensor, Schedule]]
    ) -> tuple[Tensor, Schedule, bool]:
        """Attend with the schedule that is kept for this call, or keep the one that is made.

        Args:
            layer: Name of the layer. Where it is called several times in a forward (padded text, sample by sample),
                each call has its own schedule, by its place in the order.
            shape: What a schedule depends on beside the numbers in q, k and v. A schedule of another one is dropped.
            attention: Schedule, or None to plan, to the output and the schedule that was used.

        Returns:
            Output, schedule, and whether it had been kept.
        """
        place = layer, self._calls[layer]
        self._calls[layer] += 1
        found = self.kept.pop(place, None)
        if found is not None and found.shape != shape:
            found = None
        out, schedule = attention(None if found is None else found.schedule)
        self.kept[place] = found or _Kept(schedule, self.now, shape)
        return out, schedule, found is not None


def _are_same(text: Any, other: Any) -> bool:
    if isinstance(text, Tensor) and isinstance(other, Tensor):
        return text.data_ptr() == other.data_ptr() and text.shape == other.shape
    return text is other
