"""What the self-attentions of a pipeline really did, observed from outside the package."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections import Counter
from typing import Any

import pytest
import torch
from guests import denoisers

from psa_diffusers.models import families
from psa_diffusers.processors import base as ours

SELF_ATTENTIONS = r"(transformer_)?blocks\.\d+\.attn1"  # of CogVideoX and Wan


def mirrored() -> dict[str, set[str]]:
    """The upstream processors that our families mirror, and the digests under which they were read."""
    return {
        path: digests for name in families.__all__ for path, digests in getattr(families, name).UPSTREAM_DIGESTS.items()
    }


def named_inputs(module: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a module's forward by name."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


def find_class(path: str) -> type | None:
    """The class at a path, None if this version of diffusers has none, or keeps no more than its name."""
    module, name = path.rsplit(".", 1)
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return cls if "__call__" in vars(cls or object) else None


class Watch:
    """Lists `(timestep, kind)` of every self-attention call of the watched denoisers, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[float, str]] = []
        self._timestep = float("nan")
        self._attentions: set[Any] = set()
        for upstream in filter(None, map(find_class, mirrored())):
            monkeypatch.setattr(upstream, "__call__", self._noting_dense(upstream.__call__))
        for name in ("sparse", "sparse_padded"):
            call = getattr(ours.FamilyProcessor, name)
            monkeypatch.setattr(ours.FamilyProcessor, name, self._noting_sparse(call))

    def denoisers(self, pipe: Any, attentions: str = SELF_ATTENTIONS) -> None:
        """Listen to a pipeline's denoisers.

        Args:
            pipe: The pipeline.
            attentions: Regular expression of the paths of the video self-attentions.
        """
        for denoiser in denoisers(pipe):
            self.denoiser(denoiser, attentions)

    def denoiser(self, denoiser: Any, attentions: str) -> Any:
        """Listen to one denoiser; return the handle of the hook that does."""
        modules = denoiser.named_modules()
        self._attentions |= {module for path, module in modules if re.fullmatch(attentions, path)}
        return denoiser.register_forward_pre_hook(self._read_timestep, with_kwargs=True)

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

    def forget(self) -> None:
        """Know no denoiser any more; the hooks are the caller's to remove."""
        self.clear()
        self._attentions.clear()

    def _read_timestep(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._timestep = float(named_inputs(module, args, kwargs)["timestep"].max())

    def _noting_dense(self, call: Any) -> Any:
        @functools.wraps(call)
        def wrapped(self_: Any, attn: Any, *args: Any, **kwargs: Any):
            # what compiled code does is not seen: it would be compiled again for every timestep
            if attn in self._attentions and not torch.compiler.is_compiling():
                self.calls.append((self._timestep, "dense"))
            return call(self_, attn, *args, **kwargs)

        return wrapped

    def _noting_sparse(self, call: Any) -> Any:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.calls.append((self._timestep, "sparse"))
            return call(*args, **kwargs)

        return wrapped


def expected_steps(num_steps: int, warmup: int, calls: int, dense_last: int = 0) -> list[Counter]:
    """`calls` self-attention calls a step, all dense in the first and last steps, all sparse in the others."""
    return [
        Counter({"dense" if step < warmup or step >= num_steps - dense_last else "sparse": calls})
        for step in range(num_steps)
    ]
