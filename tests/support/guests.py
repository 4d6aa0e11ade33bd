"""Pipelines under PSA: the small preset, and the parts of a pipeline that PSA is about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY_PRESET

from psa_diffusers.pipelines.enable import enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.processors.standalone import PSAProcessor

one_of_each = pytest.mark.parametrize("name", ["cogvideox", "wan2.1"])
"""A pipeline of joint attention and one with cross-attention: enough for what no family decides."""


def enable(pipe: Any, **kwargs: Any) -> Any:
    return enable_psa(pipe, **{**TINY_PRESET, **kwargs})


both_ways = pytest.mark.parametrize("how", ["pipeline", "denoiser"])
"""PSA by `enable_psa`, and by a `PSAProcessor` on the denoiser."""


def put_on(pipe: Any, how: str, **choice: Any) -> Any:
    """Give a pipeline PSA by one of both ways."""
    if how == "pipeline":
        return enable(pipe, **choice)
    pipe.transformer.set_attn_processor(PSAProcessor(**{**TINY_PRESET, **choice}))
    return pipe


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


def forwards_told(pipe: Any) -> list[tuple[int, str]]:
    """Step and kind of each forward, as the report tells them of the first self-attention."""
    records = psa_report(pipe).records
    return [(record["step"], record["kind"]) for record in records if record["layer"] == records[0]["layer"]]


def forwards_due(num_steps: int, warmup: int, *, last: int = 0, each: int = 1) -> list[tuple[int, str]]:
    """The same as it must be of a run with dense steps at both ends.

    Args:
        num_steps: Denoising steps.
        warmup: Dense ones at the start.
        last: Dense ones at the end.
        each: Forwards a step.
    """
    kinds = ["dense" if step < warmup or step >= num_steps - last else "sparse" for step in range(num_steps)]
    return [(step, kind) for step, kind in enumerate(kinds) for _ in range(each)]
