"""Pipelines under PSA: the small preset, and the parts of a pipeline that PSA is about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY_PRESET

from psa_diffusers.pipelines.enable import enable_psa

one_of_each = pytest.mark.parametrize("name", ["cogvideox", "wan2.1"])
"""A pipeline of joint attention and one with cross-attention: enough for what no family decides."""


def enable(pipe: Any, **kwargs: Any) -> Any:
    return enable_psa(pipe, **{**TINY_PRESET, **kwargs})


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]


def attentions(pipe: Any) -> list[tuple[str, torch.nn.Module]]:
    """Path and module of everything in the denoisers that has an attention processor."""
    return [
        (path, module)
        for part in denoisers(pipe)
        for path, module in part.named_modules()
        if hasattr(module, "processor")
    ]
