"""The clock: which denoising step is running, and whether it runs dense or sparse."""

from __future__ import annotations

import logging
import math
from typing import Any

from diffusers.callbacks import PipelineCallback
from torch import Tensor

logger = logging.getLogger("psa_diffusers")

USUAL_STEPS = 50
"""Steps of the runs for which presets count their warm-up; see `WarmupScheduler.follows`."""


class WarmupScheduler(PipelineCallback):
    """Know the running denoising step and whether warm-up makes it dense. Calls of the denoiser are never counted.

    `enable_psa` makes one, feeds it in every call of the pipeline, and resets it around the call. It also works alone,
    as `pipe(..., callback_on_step_end=clock)`, for code that wants to read `step`.

    A step is one step of the scheduler. Schedulers that evaluate the denoiser twice a step (Heun) say so by `order`.
    Pipelines that generate in segments (windows, chunks, stages) begin at step 0 in each of them.

    Who tells the step, the first that can:

    - `at`: the timestep *object* that the pipeline is at. Its values are not compared: a dtype may merge them;
    - `go_to`: an index that somebody else knows, as diffusers' guiders and schedulers do;
    - `callback_on_step_end`: it fires *after* step i, so step i + 1 is next;
    - `observe`: the values of a denoiser's `timestep`, where there is no pipeline. A new value is a new step, a rising
      value a new run; guidance repeats a value and changes nothing. Two steps that round to one value count as one.

    Args:
        warmup_steps: Steps at the start of a run, and of each segment, that are dense.
        dense_last_steps: Steps at the end that are dense. Needs the number of steps, which only a pipeline tells.
        follows: Whether a warm-up that would leave no sparse step is a share instead: that of `warmup_steps` in a run
            of 50 steps. For counts that nobody chose for this very run.

    Attributes:
        step: The running denoising step, from 0.
        rounds: How often the first step has begun: a number for each run, and each segment of a run.
        dense: Whether this step is dense. Changes between steps only, so that compiled code sees two values.
        reason: Why it is dense, empty if it is sparse.
        num_steps: Steps of this run, None while unknown.
        is_told: Whether the pipeline itself has told a step of this run.
        has_warned: Whether it was said that this run has no sparse step.

    Raises:
        ValueError: If a number of steps is negative or no integer.
    """

    tensor_inputs: list[str] = []  # noqa: RUF012 - the form that diffusers' own callbacks use

    def __init__(self, warmup_steps: int = 0, *, dense_last_steps: int = 0, follows: bool = False) -> None:
        super().__init__()
        for name, steps in (("warmup_steps", warmup_steps), ("dense_last_steps", dense_last_steps)):
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise ValueError(
                    f"{name} must be an integer of at least 0 (a number of denoising steps), got {steps!r}"
                )
        self.warmup_steps = warmup_steps
        self.dense_last_steps = dense_last_steps
        self.follows = follows
        self.rounds = 0
        self.reset()

    def reset(self) -> None:
        """Go back to the first step of a run of unknown length."""
        self.num_steps: int | None = None
        self.is_told = False
        self.has_warned = False
        self._order = 1
        self._evaluation = 0
        self._timestep: float | None = None
        self._place: Any = None
        self._loop_begins = False
        self._begin()

    @property
    def idle(self) -> bool:
        """Whether no step can be dense."""
        return self.warmup_steps == 0 and self.dense_last_steps == 0

    @property
    def warmup(self) -> int:
        """Dense steps at the start of this run."""
        if not self.follows or self.num_steps is None or self.warmup_steps < self.num_steps:
            return self.warmup_steps
        return math.ceil(self.num_steps * min(self.warmup_steps / USUAL_STEPS, 1))

    def set_length(self, num_timesteps: int | None, order: int = 1) -> None:
        """Learn how long the running call, or its segment, is; warn, once a call, if that leaves no sparse step.

        Args:
            num_timesteps: Evaluations of the denoiser, which is what pipelines call timesteps; None changes nothing.
            order: How many of them make one step.
        """
        num_steps = None if num_timesteps is None else -(-num_timesteps // order)
        if num_steps is None or (num_steps, order) == (self.num_steps, self._order):
            return
        self.num_steps, self._order = num_steps, order
        self._go_to(self._evaluation // order if order > 1 else self.step)
        dense = self.warmup + self.dense_last_steps
        if self.has_warned or self.idle:
            return
        if self.warmup < self.warmup_steps:
            self.has_warned = dense >= num_steps
            logger.info(
                "%d of %d steps are dense at the start: warmup_steps=%d of the preset is meant for runs of %d steps",
                self.warmup,
                num_steps,
                self.warmup_steps,
                USUAL_STEPS,
            )
        if dense >= num_steps:
            self.has_warned = True
            asked = f"warmup_steps={self.warmup_steps}"
            if self.dense_last_steps:
                asked += f" and dense_last_steps={self.dense_last_steps}"
            logger.warning(
                "nothing will be sparse: %s of a run of %d steps; lower warmup_steps, for example "
                "enable_psa(pipe, ..., warmup_steps=%d)",
                asked,
                num_steps,
                num_steps // 4,
            )

    def begin_loop(self, num_steps: int | None = None) -> None:
        """Hear that the pipeline begins a loop: of a segment, unless the next timestep follows the last one.

        Args:
            num_steps: How often it will go round, if that is known better than by `set_length`.
        """
        self._loop_begins = True
        if num_steps is not None:
            self.set_length(num_steps)
        if self._place is None:
            self._begin()

    def at(self, timestep: Any) -> None:
        """Hear which timestep object the pipeline is at, before the denoiser runs. Reads no numbers, so nothing waits.

        Args:
            timestep: A tensor cut from the scheduler's timesteps: where it lies in their memory tells its order. Any
                other object tells by being another one.
        """
        last, self._place = self._place, timestep  # held, so that its memory cannot become another timestep's
        is_new_loop, self._loop_begins = self._loop_begins, False
        self.is_told = True
        if last is timestep:
            return
        before, now = _memory(last), _memory(timestep)
        if last is None:
            self._begin()
        elif before is None or now is None or before[0] != now[0]:
            # a number, or a copy, tells no order; a piece of other memory is of other timesteps, or of a copy of them
            is_piece = now is not None and timestep.untyped_storage().nbytes() > timestep.nbytes
            falls_back = is_piece and (before is None or now is None or now[1] <= before[1])
            self._begin() if is_new_loop or falls_back else self._next()
        elif now[1] > before[1]:
            self._next()
        elif now[1] < before[1] or is_new_loop:
            self._begin()

    def go_to(self, step: int, *, is_new: bool = False) -> None:
        """Hear the index of the running step; one that falls back begins a segment.

        Args:
            step: The index.
            is_new: Whether it is known that another step begins, so that a second step 0 is one of another segment.
        """
        if step < self.step or (step == 0 and (self._loop_begins or is_new)):
            self._begin()
        self._loop_begins = False
        if step != self.step:
            self._evaluation = step * self._order
            self._go_to(step)

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Form of `callback_on_step_end`: evaluation `step_index` is over."""
        order = getattr(getattr(pipeline, "scheduler", None), "order", 1)
        num_timesteps = getattr(pipeline, "num_timesteps", None)
        self.set_length(num_timesteps, order)
        if self._place is not None:
            return callback_kwargs  # the pipeline has told this step itself, and will tell the next one
        self.is_told = True
        following = step_index + 1
        # pipelines that generate in segments begin again at 0 after the last step of a segment
        if following == num_timesteps:
            self._begin()
        else:
            self._evaluation = following
            self._go_to(following // order)
        return callback_kwargs  # the pipeline pops from it

    def observe(self, timestep: Any) -> bool:
        """Read the step from the `timestep` of a denoiser's forward. Synchronises a GPU.

        Args:
            timestep: A number or a tensor; of one timestep per token (Wan 2.2 TI2V) the largest counts.

        Returns:
            Whether a new run has begun.
        """
        value = float(timestep.max() if hasattr(timestep, "max") else timestep)
        last, self._timestep = self._timestep, value
        if last is None or value > last:
            self._begin()
            return True
        if value < last:
            self._next()
        return False

    def _begin(self) -> None:
        self.rounds += 1
        self._evaluation = 0
        self._go_to(0)

    def _next(self) -> None:
        self._evaluation += 1
        self._go_to(self._evaluation // self._order)

    def _go_to(self, step: int) -> None:
        self.step = step
        is_last = self.num_steps is not None and step >= self.num_steps - self.dense_last_steps
        is_first = step < self.warmup
        self.dense = is_first or is_last
        self.reason = "warm-up" if is_first else "one of the last steps" if is_last else ""


def _memory(timestep: Any) -> tuple[int, int] | None:
    """Where a tensor begins: its storage, and the place in it."""
    if not isinstance(timestep, Tensor):
        return None
    return timestep.untyped_storage().data_ptr(), int(timestep.storage_offset())
