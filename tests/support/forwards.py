"""Single forwards of a denoiser, and how far they are from the same forward in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import ALL_CASES
from watch import named_inputs

from psa_diffusers.processors import base as processor


def captured_inputs(pipe: Any, name: str, **kwargs: Any) -> list[dict[str, Any]]:
    """Arguments of every denoiser forward of one call."""
    inputs = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = named_inputs(module, args, kwargs)
        given.pop("self")
        inputs.append(given)

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    ALL_CASES[name].run(pipe, **kwargs)
    handle.remove()
    return inputs


def forward(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the pipeline's denoiser makes of the inputs, without what else it may return."""
    return pipe.transformer(**{**inputs, "return_dict": True}).sample


def forward_in_float64(pipe: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The forward of the pipeline's denoiser in float64; PSA, which runs float64 dense otherwise, runs it sparse."""

    def widen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(widen, value))
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    weights = copy.deepcopy(pipe.transformer.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(processor, "DTYPES", (*processor.DTYPES, torch.float64))
        pipe.transformer.double()
        truth = forward(pipe, {key: widen(value) for key, value in inputs.items()})
    pipe.transformer.float().load_state_dict(weights)
    return truth


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_as_close(actual: torch.Tensor, other: torch.Tensor, truth: torch.Tensor) -> None:
    """No further from the truth than twice another way to compute the same, and one rounding.

    The factor two leaves room for another order of the same operations, as in `budget.assert_within_budget`.
    """
    budget = 2 * (error(other, truth) + torch.finfo(actual.dtype).eps)
    assert actual.dtype == other.dtype != truth.dtype
    assert error(actual, truth) <= budget, f"error {error(actual, truth):.2e}, budget {budget:.2e}"
