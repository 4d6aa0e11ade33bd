"""What a cell of docs/composition.md is compared with, and how it is marked.

Each cell is compared with the same thing under dense attention (at factor one everywhere they must agree) and with PSA
alone. What a cell promises stands in its row in scripts/docs/composition.py, and the test fails unless it is so.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forwards import captured_inputs, error
from tiny import CASES, TINY_PRESET

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.pipelines.state import state_of
from psa_diffusers.processors import base as ours
from scripts.docs.composition import BIT, REFUSED, ROUNDING, ROWS

CPU = torch.device("cpu")
SPARSE = {**TINY_PRESET, "warmup_steps": 1}
ONE = {**TINY_PRESET, "mask_ratios": {1: [0, 1]}}
"""Sparse from the first step to the last, reading everything: dense attention by another way."""

ROW_OF = {f"test_{row.name}": row for row in ROWS}


def composes(*, orders: tuple[str, ...] = ("before", "after"), needs: str = "") -> Callable[[Any], Any]:
    """Mark a test as that of the row of its name.

    The test takes the name of a model and, if it has orders, when the technique is applied; it returns what it found
    to hold, which must be the outcome of the row or better.

    Args:
        orders: Whether the technique is applied before or after `enable_psa`; empty if that means nothing.
        needs: Package without which the test is skipped.
    """

    def mark(test: Any) -> Any:
        row = ROW_OF[test.__name__]

        @functools.wraps(test)
        def checked(**kwargs: Any) -> None:
            if row.outcome == REFUSED:
                with pytest.raises(RuntimeError, match=re.escape(row.refusal)):
                    test(**kwargs)
                return
            found = test(**kwargs)
            assert found in (BIT, ROUNDING), "a cell must say what it has found"
            assert found == BIT or row.outcome == ROUNDING, f"{row.title}: {found}, promised: {row.outcome}"

        if orders:
            checked = pytest.mark.parametrize("order", orders)(checked)
        checked = pytest.mark.parametrize("name", row.models)(checked)
        if needs:
            is_there = importlib.util.find_spec(needs) is not None
            reason = f"needs {needs}: pip install --no-deps --target DIR, and DIR in PYTHONPATH"
            checked = pytest.mark.skipif(not is_there, reason=reason)(checked)
        return checked

    return mark


def build(name: str) -> Any:
    return CASES[name].build()


@functools.cache
def latents_of(name: str) -> torch.Tensor:
    """Noise to start from: drawn in float32, so that runs in float64 start from the same."""
    drawn = []
    pipe = build(name)

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: drawn.append(prepare(*args, **kwargs)) or drawn[-1]
    CASES[name].run(pipe, steps=1, callback_on_step_end=callback)
    return drawn[0].clone()


def run(pipe: Any, name: str, **kwargs: Any) -> torch.Tensor:
    dtype = pipe.vae.dtype
    return CASES[name].run(pipe, latents=latents_of(name).to(dtype), **kwargs)


def calls(pipe: Any) -> list[tuple[int, str, str]]:
    """Step, layer and kind of every call of a self-attention in the last run."""
    return [(record["step"], record["layer"], record["kind"]) for record in psa_report(pipe).records]


@functools.cache
def alone(name: str, which: str) -> tuple[torch.Tensor, list[tuple[int, str, str]]]:
    """Video and calls of a pipeline with nothing but PSA: `sparse`, `one` (everything read) or `dense`."""
    pipe = build(name)
    switch_on(pipe, which)
    return run(pipe, name), calls(pipe)


def switch_on(pipe: Any, which: str) -> None:
    if which == "dense":
        enable_psa(pipe, "baseline", report=True)
    else:
        enable_psa(pipe, report=True, **(SPARSE if which == "sparse" else ONE))


def assert_as_close(actual: torch.Tensor, other: torch.Tensor, truth: torch.Tensor) -> str:
    """No further from the truth than twice another way to compute the same, and one rounding: as in forwards.py."""
    if torch.equal(actual, other):
        return BIT
    budget = 2 * (error(other, truth) + torch.finfo(actual.dtype).eps)
    assert error(actual, truth) <= budget, f"error {error(actual, truth):.2e}, budget {budget:.2e}"
    return ROUNDING


def sparse_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """PSA, which runs float64 dense otherwise, runs it sparse."""
    monkeypatch.setattr(ours, "DTYPES", (*ours.DTYPES, torch.float64))


def check_exact(name: str, technique: Callable[[Any], Any], order: str) -> str:
    """For what changes no arithmetic: with it, PSA gives what it gives alone, and so does dense attention.

    Two runs each, because hooks can be lost after the first.
    """
    pipe = build(name)
    if order == "before":
        pipe = technique(pipe) or pipe
    for which in ("sparse", "one", "dense"):
        switch_on(pipe, which)
        if order == "after" and which == "sparse":
            pipe = technique(pipe) or pipe
        video, expected = alone(name, which)
        for _ in range(2):
            assert torch.equal(run(pipe, name), video)
            assert calls(pipe) == expected
        disable_psa(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])
    return BIT


def check_weights(name: str, technique: Callable[[Any], Any], order: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """For what changes the weights or the order of sums: compared with a plain denoiser of the same weights.

    In one forward: rounding that decides otherwise which blocks are read would be another, right, result.
    """
    pipe, plain = build(name), build(name)
    inputs = captured_inputs(pipe, name, steps=1)[0]
    results = {}
    if order == "before":
        technique(pipe)
    for which in ("sparse", "one"):
        switch_on(pipe, which)
        state_of(pipe).switch.run.clock.warmup_steps = 0
        state_of(pipe).switch.run.clock.reset()
        if order == "after" and which == "sparse":
            technique(pipe)
        results[which] = pipe.transformer(**inputs)[0]
        assert {record["kind"] for record in psa_report(pipe).records} == {"sparse"}
        disable_psa(pipe)
    results["dense"] = pipe.transformer(**inputs)[0]
    for path, module in plain.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            _copy_effective_weights(pipe.transformer.get_submodule(path), module)

    enable_psa(plain, **TINY_PRESET)
    plain_sparse = plain.transformer(**inputs)[0]
    sparse_in_float64(monkeypatch)
    wide = {key: _widen(value) for key, value in inputs.items()}
    plain.transformer.double()
    sparse_truth = plain.transformer(**wide)[0]
    disable_psa(plain)
    truth = plain.transformer(**wide)[0]
    found = {
        assert_as_close(results["sparse"], plain_sparse, sparse_truth),
        assert_as_close(results["one"], results["dense"], truth),
    }
    return BIT if found == {BIT} else ROUNDING


def _copy_effective_weights(layer: torch.nn.Module, plain: torch.nn.Linear) -> None:
    """Give a plain linear layer the weights with which `layer` computes, whatever it stores."""
    rows = torch.eye(plain.in_features)[None]
    bias = layer(torch.zeros_like(rows[:, :1]))[0, 0]
    plain.weight.copy_((layer(rows)[0] - bias).T)
    if plain.bias is not None:
        plain.bias.copy_(bias)


def _widen(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_widen, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check_cache(
    name: str,
    order: str,
    idle: Callable[[Any], Any],
    busy: Callable[[Any], Any],
    off: Callable[[Any], Any] = lambda pipe: pipe.transformer.disable_cache(),
) -> str:
    """For what skips work: where it never skips, PSA is as alone; where it does, it skips the same as under dense.

    Args:
        name: Model.
        order: Whether the cache is switched on before or after PSA.
        idle: Switches it on such that it never skips.
        busy: Switches it on such that it does.
        off: Switches it off.
    """
    pipe = build(name)
    both_on(pipe, idle, "sparse", order)
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    assert calls(pipe) == alone(name, "sparse")[1]
    disable_psa(pipe)
    off(pipe)

    videos, made = {}, {}
    for which in ("dense", "one", "sparse"):
        both_on(pipe, busy, which, order)
        videos[which], made[which] = run(pipe, name), calls(pipe)
        assert torch.equal(run(pipe, name), videos[which]), "a second run starts with an empty cache"
        disable_psa(pipe)
        assert torch.equal(run(pipe, name), videos["dense"])
        off(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])

    skipped = {call[:2] for call in alone(name, "dense")[1]} - {call[:2] for call in made["dense"]}
    assert skipped or len(made["dense"]) < len(alone(name, "dense")[1]), "the cache must skip something here"
    for which in ("one", "sparse"):
        assert [call[:2] for call in made[which]] == [call[:2] for call in made["dense"]]
    assert {kind for *_, kind in made["one"]} == {"sparse"}
    assert {kind for step, _, kind in made["sparse"] if step > 0} == {"sparse"}
    truth_pipe = build(name).to(torch.float64)
    busy(truth_pipe)
    truth = run(truth_pipe, name)
    off(truth_pipe)
    assert_as_close(videos["one"], videos["dense"], truth)
    assert error(videos["sparse"], videos["dense"]) > 10 * error(videos["one"], videos["dense"])
    return ROUNDING


def both_on(pipe: Any, technique: Callable[[Any], Any], which: str, order: str) -> None:
    if order == "before":
        technique(pipe)
    switch_on(pipe, which)
    if order == "after":
        technique(pipe)
