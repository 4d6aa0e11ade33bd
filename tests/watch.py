"""What the self-attentions of a pipeline really did, observed from outside the package."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from psa_diffusers.models import processor as ours


class Watch:
    """Lists `(timestep, kind)` of every self-attention call of the watched denoisers, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[float, str]] = []
        self._timestep = float("nan")
        for upstream in (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0, WanAttnProcessor):
            monkeypatch.setattr(upstream, "__call__", self._noting_dense(upstream.__call__))
        monkeypatch.setattr(ours, "psa_attention", self._noting_sparse(ours.psa_attention))

    def denoisers(self, pipe: Any) -> None:
        """Listen to the timesteps of a pipeline's denoisers."""
        for denoiser in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if denoiser is not None:
                denoiser.register_forward_pre_hook(self._read_timestep, with_kwargs=True)

    def steps(self) -> list[Counter]:
        """Calls of each kind in each denoising step, of everything since the last `clear`."""
        steps, last = [], None
        for timestep, kind in self.calls:
            if timestep != last:
                steps.append(Counter())
            steps[-1][kind] += 1
            last = timestep
        return steps

    def clear(self) -> None:
        self.calls.clear()

    def _read_timestep(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._timestep = float(kwargs["timestep"].max())

    def _noting_dense(self, call: Any) -> Any:
        @functools.wraps(call)
        def wrapped(self_: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args, **kwargs):
            if encoder_hidden_states is None or not isinstance(self_, WanAttnProcessor):
                self.calls.append((self._timestep, "dense"))
            return call(self_, attn, hidden_states, encoder_hidden_states, *args, **kwargs)

        return wrapped

    def _noting_sparse(self, call: Any) -> Any:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((self._timestep, "sparse"))
            return call(*args, **kwargs)

        return wrapped


def expected_steps(num_steps: int, warmup: int, calls: int, dense_last: int = 0) -> list[Counter]:
    """`calls` self-attention calls a step, all dense in the first and last steps, all sparse in the others."""
    return [
        Counter({"dense" if step < warmup or step >= num_steps - dense_last else "sparse": calls})
        for step in range(num_steps)
    ]
