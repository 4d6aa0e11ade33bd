"""Notes of what each self-attention did, for the report."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Recorder:
    """Notes each call of a self-attention. Density stays a tensor on its device: noting it does not synchronise.

    Args:
        title: What was enabled, one line.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.entries: list[dict[str, Any]] = []

    def clear(self) -> None:
        """Forget the calls; a new run begins."""
        self.entries = []

    def note(
        self,
        *,
        step: int,
        denoiser: str,
        layer: str,
        kind: str,
        reason: str,
        density: float | torch.Tensor,
        kept: bool,
        tokens: int,
        grid: tuple[int, int, int] | None,
    ) -> None:
        """Add one call."""
        self.entries.append(
            {
                "step": step,
                "denoiser": denoiser,
                "layer": layer,
                "kind": kind,
                "reason": reason,
                "density": density,
                "kept": kept,
                "tokens": tokens,
                "grid": grid,
            }
        )


class Measured(NamedTuple):
    """What is recorded of a call.

    Attributes:
        reason: Why it is not as asked: dense, or sparse without a level map that could be kept. Else empty.
        density: Share of the dense work.
        kept: Whether the level map is that of an earlier step.
    """

    reason: str = ""
    density: float | Tensor = 1.0
    kept: bool = False
