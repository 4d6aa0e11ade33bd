"""The clock: which denoising step is running, and whether it runs dense or sparse."""

from __future__ import annotations

import logging
from typing import Any

from diffusers.callbacks import PipelineCallback

logger = logging.getLogger("psa_diffusers")


class WarmupScheduler(PipelineCallback):
    """Know the running denoising step and whether warm-up makes it dense. Calls are never counted.

    `enable_psa` makes one, hands it to every call of the pipeline, next to a callback of yours, and resets it around
    the call. It also works alone, as `pipe(..., callback_on_step_end=clock)`, for code that wants to read `step`.

    Two feeders with one meaning:

    - the pipeline, through `callback_on_step_end`: it fires *after* step i, so step i + 1 is next;
    - a denoiser's own `timestep`, through `observe`, where there is no pipeline: a new value is a new step, a rising
      value a new run. Guidance repeats a value and changes nothing.

    Args:
        warmup_steps: Steps at the start of a run that are dense.
        dense_last_steps: Steps at the end that are dense. Needs the number of steps, which only a pipeline tells.

    Attributes:
        step: The running denoising step, from 0.
        rounds: How often the first step has begun: a number for each run, and each segment of a run.
        dense: Whether this step is dense. Changes between steps only, so that compiled code sees two values.
        reason: Why it is dense, empty if it is sparse.
        num_steps: Steps of this run, None while unknown.

    Raises:
        ValueError: If a number of steps is negative or no integer.
    """

    tensor_inputs: list[str] = []  # noqa: RUF012 - the form that diffusers' own callbacks use

    def __init__(self, warmup_steps: int = 0, *, dense_last_steps: int = 0) -> None:
        super().__init__()
        for name, steps in (("warmup_steps", warmup_steps), ("dense_last_steps", dense_last_steps)):
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise ValueError(
                    f"{name} must be an integer of at least 0 (a number of denoising steps), got {steps!r}"
                )
        self.warmup_steps = warmup_steps
        self.dense_last_steps = dense_last_steps
        self.rounds = 0
        self.reset()

    def reset(self) -> None:
        """Go back to the first step of a run of unknown length."""
        self.num_steps: int | None = None
        self._timestep: float | None = None
        self._begin()

    @property
    def idle(self) -> bool:
        """Whether no step can be dense."""
        return self.warmup_steps == 0 and self.dense_last_steps == 0

    def set_length(self, num_steps: int | None) -> None:
        """Learn how many steps the running call has; warn, once a call, if that leaves no sparse step."""
        if num_steps is None or num_steps == self.num_steps:
            return
        first_time = self.num_steps is None
        self.num_steps = num_steps
        self._go_to(self.step)
        if first_time and not self.idle and self.warmup_steps + self.dense_last_steps >= num_steps:
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

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Form of `callback_on_step_end`: step `step_index` is over."""
        self.set_length(getattr(pipeline, "num_timesteps", None))
        following = step_index + 1
        # pipelines that generate in segments begin again at 0 after the last step of a segment
        if following == self.num_steps:
            self._begin()
        else:
            self._go_to(following)
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
            self._go_to(self.step + 1)
        return False

    def _begin(self) -> None:
        self.rounds += 1
        self._go_to(0)

    def _go_to(self, step: int) -> None:
        self.step = step
        is_last = self.num_steps is not None and step >= self.num_steps - self.dense_last_steps
        self.dense = step < self.warmup_steps or is_last
        self.reason = "" if not self.dense else "warm-up" if step < self.warmup_steps else "one of the last steps"
