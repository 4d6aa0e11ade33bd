"""Measure a pipeline's self-attentions against dense attention while it runs, and check a finished preset."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psa_diffusers.attention import psa_attention
from psa_diffusers.calibration.ladder import DENSITIES, ladder_ratios
from psa_diffusers.calibration.notebook import Notebook
from psa_diffusers.calibration.search import Cell
from psa_diffusers.calibration.tap import Call, tap_qkv
from psa_diffusers.pipelines.enable import disable_psa, enable_psa, find_denoisers
from psa_diffusers.presets import PSAPreset
from psa_diffusers.presets.values import suggest

__all__ = ["Measurements"]


class Measurements:
    """Runs of a pipeline that measure its layers, and that check a preset.

    Args:
        pipe: The pipeline, PSA off.
        base: The preset whose shares are varied.
        parts: Parts of the run.
        max_heads: Heads that are measured in a call.
        seed: Seed of the first prompt, the next has one more.
        call: Further arguments of the pipeline.

    Raises:
        TypeError: If the pipeline has no such argument.
    """

    def __init__(
        self, pipe: Any, base: PSAPreset, parts: int, max_heads: int, seed: int, call: Mapping[str, Any]
    ) -> None:
        accepted = inspect.signature(type(pipe).__call__).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        for key in call:
            if key == "prompt":
                raise TypeError("calibrate gives every prompt of `prompts` to the pipeline; leave out prompt=")
            if key not in accepted and key != "output_type" and not takes_all:
                known = f"{type(pipe).__name__} takes no argument {key!r}"
                raise TypeError(f"{known}, and neither does calibrate.{suggest(key, accepted)}")
        self.pipe = pipe
        self.base = base
        self.parts = parts
        self.max_heads = max_heads
        self.seed = seed
        self.call = {key: value for key, value in call.items() if key != "output_type" or key in accepted}
        self.rungs = [base.replace(mask_ratios=ladder_ratios(density, base.block_n)) for density in DENSITIES]

    def measure(self, prompts: Sequence[str], path: Path, bar: Any) -> list[Cell]:
        """Run the pipeline dense and try every rung on what its self-attentions are given.

        Args:
            prompts: Prompts to run.
            path: Where the measurements stand. What an earlier call with the same arguments has measured is taken over.
            bar: Progress bar, which moves by one a prompt.

        Raises:
            RuntimeError: If nothing could be measured, or what the pipeline computes is not finite.
        """
        with Notebook(path, self._key(prompts), len(prompts), self._is_sampled) as notebook:
            for number, prompt in enumerate(prompts):
                if number not in notebook.finished:
                    self._measure_prompt(number, prompt, notebook, bar)
                    notebook.finish(number)
                bar.update()
        return self._cells(notebook.entries)

    def _measure_prompt(self, number: int, prompt: str, notebook: Notebook, bar: Any) -> None:
        def sink(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
            entry: dict[str, Any] = {
                "prompt": number,
                "denoiser": call.denoiser,
                "step": call.step,
                "layer": call.layer,
            }
            entry |= {"num_steps": call.num_steps, "forward": call.forward}
            if notebook.has(entry):
                return
            bar.set_postfix_str(f"step {call.step}, layer {call.layer}")
            heads = self._some_heads(q, k, v)
            dense = F.scaled_dot_product_attention(*heads, scale=call.scale).float()
            entry["rungs"] = [_compare(heads, dense, rung, call) for rung in self.rungs]
            notebook.add(entry)

        def is_wanted(step: int, num_steps: int | None, layer: int, num_layers: int) -> bool:
            return step in self._sampled(num_steps)

        with tap_qkv(self.pipe, is_wanted, sink):
            self._generate(prompt, number)

    def check(self, made: PSAPreset, prompts: Sequence[str], first: int, bar: Any) -> dict[str, float] | None:
        """Run the pipeline with a preset.

        Args:
            made: The preset.
            prompts: Prompts that were not measured.
            first: Number of the first of them, for its seed.
            bar: Progress bar.

        Returns:
            Mean error and density over steps, layers and prompts; None if there is no prompt.
        """
        found: dict[str, list[float]] = {"error": [], "density": []}

        def sink(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
            here = made.at(call.step, call.num_steps, call.layer, call.num_layers)
            error, density = 0.0, 1.0
            if here.type != "dense":
                heads = self._some_heads(q, k, v)
                dense = F.scaled_dot_product_attention(*heads, scale=call.scale).float()
                error, density = _compare(heads, dense, here, call)
            found["error"].append(error)
            found["density"].append(density)

        def is_wanted(step: int, num_steps: int | None, layer: int, num_layers: int) -> bool:
            start, stop = self._sparse_steps(num_steps)
            return start <= step < stop and (step - start) % max(1, (stop - start) // 8) == 0

        for number, prompt in enumerate(prompts):
            bar.set_postfix_str("held out")
            enable_psa(self.pipe, made)
            try:
                with tap_qkv(self.pipe, is_wanted, sink):
                    self._generate(prompt, first + number)
            finally:
                disable_psa(self.pipe)
            bar.update()
        return {kind: sum(values) / len(values) for kind, values in found.items()} if found["error"] else None

    def _generate(self, prompt: str, number: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + number)
        with torch.no_grad(), _quiet(self.pipe):
            self.pipe(**{"prompt": prompt, "generator": generator, **self.call})

    def _some_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At most so many heads, spread evenly over batch and heads: `[1, heads, L, D]`."""
        count = q.shape[0] * q.shape[1]
        index = torch.linspace(0, count - 1, min(count, self.max_heads)).round().long().to(q.device)
        return q.flatten(0, 1)[index][None], k.flatten(0, 1)[index][None], v.flatten(0, 1)[index][None]

    def _sparse_steps(self, num_steps: int | None) -> tuple[int, int]:
        if num_steps is None:
            raise RuntimeError(f"{type(self.pipe).__name__} does not tell how many steps it runs (num_timesteps)")
        start, stop = self._span(num_steps)
        if start >= stop:
            raise RuntimeError(
                f"nothing is sparse in a run of {num_steps} steps: the preset has warmup_steps={start} and "
                f"dense_last_steps={self.base.dense_last_steps}; calibrate with more steps or fewer dense ones"
            )
        return start, stop

    def _span(self, num_steps: int) -> tuple[int, int]:
        return self.base.warmup_steps, num_steps - self.base.dense_last_steps

    def _ends(self, num_steps: int | None) -> list[tuple[int, int]]:
        """Start and stop of each part of the run."""
        start, stop = self._sparse_steps(num_steps)
        parts = min(self.parts, stop - start)
        cuts = [start + round((stop - start) * part / parts) for part in range(parts + 1)]
        return list(pairwise(cuts))

    def _sampled(self, num_steps: int | None) -> set[int]:
        """The steps at a quarter and at three quarters of each part."""
        return {
            start + math.floor((stop - start) * share)
            for start, stop in self._ends(num_steps)
            for share in (0.25, 0.75)
        }

    def _is_sampled(self, step: int, num_steps: int) -> bool:
        start, stop = self._span(num_steps)
        return start < stop and step in self._sampled(num_steps)

    def _cells(self, entries: list[dict[str, Any]]) -> list[Cell]:
        if not entries:
            raise RuntimeError(
                "nothing could be measured: no self-attention ran in a step that can be sparse. "
                "record_qkv(pipe, ...) says why"
            )
        num_steps = {entry["num_steps"] for entry in entries}
        if len(num_steps) > 1:
            raise RuntimeError(f"the runs had different numbers of steps ({sorted(num_steps)}); calibrate them apart")
        groups: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
        ends = self._ends(max(num_steps))
        for entry in entries:
            part = next(part for part, (start, stop) in enumerate(ends) if start <= entry["step"] < stop)
            groups[part, entry["layer"]].append(entry["rungs"])
        cells = []
        for (part, layer), measured in sorted(groups.items()):
            error, density = torch.tensor(measured, dtype=torch.double).mean(0).T.tolist()
            cells.append(Cell(part, ends[part], max(num_steps), layer, (*error, 0.0), (*density, 1.0)))
        return cells

    def _key(self, prompts: Sequence[str]) -> str:
        """What the measurements depend on."""
        call = {key: repr(value) for key, value in sorted(self.call.items())}
        plain = [
            self.base.replace(description="").key,
            list(prompts),
            DENSITIES,
            self.parts,
            self.max_heads,
            self.seed,
            call,
        ]
        weights = [_weights_of(denoiser) for _, denoiser, _ in find_denoisers(self.pipe)]
        return hashlib.sha256(json.dumps([*plain, weights]).encode()).hexdigest()[:16]


def _compare(heads: tuple[Tensor, Tensor, Tensor], dense: Tensor, preset: PSAPreset, call: Call) -> tuple[float, float]:
    """Relative L1 error and density of a preset on one call."""
    out, schedule = psa_attention(
        *heads,
        preset,
        grid=call.grid,
        text_tokens=call.text_tokens,
        text_first=call.text_first,
        scale=call.scale,
        return_schedule=True,
    )
    error = float((out.float() - dense).abs().sum() / dense.abs().sum().clamp_min(1e-30))
    if not math.isfinite(error):
        whose = "attention under PSA" if bool(torch.isfinite(dense).all()) else "dense attention"
        raise RuntimeError(
            f"{whose} is not finite in step {call.step}, layer {call.layer} of {call.denoiser}; likely causes are a "
            "dtype that overflows, a LoRA, or broken weights: look at a video of this pipeline without PSA first"
        )
    return error, float(schedule.density())


def _weights_of(denoiser: nn.Module) -> list[Any]:
    """Enough of the weights to tell another training, or a LoRA that was fused, from the same: a few of each tensor."""
    known = []
    for name, weight in denoiser.named_parameters():
        sample = []
        if weight.device.type != "meta" and weight.is_floating_point() and type(weight.data) is Tensor:
            sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // 4)][:4].float().tolist()
        known.append([name, weight.numel(), sample])
    return known


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar: there is one already."""
    before = getattr(pipe, "_progress_bar_config", None)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is not None:
            pipe._progress_bar_config = before
        elif hasattr(pipe, "_progress_bar_config"):
            del pipe._progress_bar_config
