"""Find, for a pipeline and prompts, how dense each layer must be in each part of the run to meet a target error."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm.auto import tqdm

from psa_diffusers.attention import psa_attention
from psa_diffusers.calibration.record import Call, tap_qkv
from psa_diffusers.pipelines.enable import disable_psa, enable_psa, find_denoisers
from psa_diffusers.pipelines.report import SWITCH
from psa_diffusers.presets.schema import PSAPreset, load_preset
from psa_diffusers.processors.base import resolve_preset

__all__ = ["Calibration", "calibrate"]

logger = logging.getLogger("psa_diffusers")

DENSITIES = (0.03, 0.05, 0.07, 0.10, 0.14, 0.20, 0.28, 0.40, 0.55, 0.75)
"""Rungs of the ladder below dense attention."""

_DENSE = len(DENSITIES)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. Errors are relative L1 errors of the attention output, densities shares of dense work.

    Both are means over the calls of all self-attentions in the steps that are not warm-up; where a layer is dense its
    error is 0 and its density 1.

    Attributes:
        path: The YAML file.
        section: Section of the preset in that file.
        name: Its name.
        target_error: What was asked for, or None.
        target_density: What was asked for, or None.
        predicted_error: Error on the prompts that were measured.
        predicted_density: Density on them.
        measured_error: Error of the finished preset on the held-out prompts; None if there were none.
        measured_density: Density on them.
        densities: Chosen density by part of the run and layer, `[parts][layers]`, 1 where dense.
    """

    path: Path
    section: str
    name: str
    target_error: float | None
    target_density: float | None
    predicted_error: float
    predicted_density: float
    measured_error: float | None
    measured_density: float | None
    densities: tuple[tuple[float, ...], ...]

    def summary(self) -> str:
        """Return a few lines: the target, the prediction, the check, and how to use the preset."""
        target = f"error {self.target_error:g}" if self.target_error is not None else f"density {self.target_density:g}"
        lines = [
            f"target {target}",
            f"predicted: error {self.predicted_error:.4f} at density {self.predicted_density:.3f}",
        ]
        if self.measured_error is not None:
            lines.append(f"held-out prompts: error {self.measured_error:.4f} at density {self.measured_density:.3f}")
        lines.append(f'use it with enable_psa(pipe, "{self.name}", config="{self.path}")')
        return "\n".join(lines)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    target_error: float | None = None,
    target_density: float | None = None,
    path: str | Path = "calibrated.yaml",
    name: str = "calibrated",
    preset: str | PSAPreset | None = None,
    held_out: Sequence[str] | None = None,
    parts: int = 4,
    max_heads: int = 8,
    seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> Calibration:
    """Measure the layers of a running pipeline against dense attention, and write a preset that meets a target.

    Runs the pipeline once a prompt, dense, and tries a ladder of densities on the q, k, v of every self-attention, in
    two steps of each part of the run. Then one price for error decides the density of every layer in every part, such
    that the mean error (or density) is the target. The preset is checked on the held-out prompts, with PSA on.

    What was measured stands in a file beside the preset, and a second call with the same arguments goes on where the
    first one stopped; another target needs no new measurement.

    Args:
        pipe: A pipeline with a denoiser of a known family, PSA off.
        prompts: Prompts to measure.
        target_error: Mean relative L1 error of the attention output to reach. Give this or `target_density`.
        target_density: Mean density to reach.
        path: The YAML to write. It holds one section with one preset, for `config=`.
        name: Name of the preset.
        preset: What to vary the shares of: a name of the model's section or a `PSAPreset`, by default psa_cover. Its
            warm-up steps stay dense and count neither as error nor as density.
        held_out: Prompts for the check. By default the last quarter of `prompts`, which then is not measured; an empty
            list checks nothing.
        parts: Parts of the run, each with densities of its own.
        max_heads: Heads (of all in a batch) that are measured in a call.
        seed: Seed of the first prompt, the next has one more.
        progress: Whether to show a progress bar.
        **call: Further arguments of the pipeline, such as `num_inference_steps`.

    Raises:
        RuntimeError: If PSA is on, or nothing could be measured.
        TypeError: If the pipeline has no denoiser of a known family.
        ValueError: If the target or another argument is not valid.
    """
    _check_target(target_error, target_density, prompts)
    if getattr(pipe, SWITCH, None) is not None:
        raise RuntimeError("PSA is on in this pipeline; call disable_psa(pipe) before calibrate")
    base, section = _base_preset(pipe, preset)
    if held_out is None:
        cut = len(prompts) - max(1, len(prompts) // 4) if len(prompts) > 1 else 1
        prompts, held_out = prompts[:cut], prompts[cut:]
    path = Path(path)
    run = _Runs(pipe, base, parts, max_heads, seed, {"output_type": "latent", **call})
    with _bar(len(prompts) + len(held_out), progress) as bar:
        cells = run.measure(prompts, path.with_name(path.name + ".measured.jsonl"), bar)
        budget = ("error", target_error) if target_error is not None else ("density", target_density)
        chosen = _choose(cells, *budget)
        predicted = {kind: _mean(cells, chosen, kind) for kind in ("error", "density")}
        made = _assemble(base, name, cells, chosen)
        checked = run.check(made, held_out, len(prompts), bar)
    result = Calibration(
        path=path,
        section=section,
        name=name,
        target_error=target_error,
        target_density=target_density,
        predicted_error=predicted["error"],
        predicted_density=predicted["density"],
        measured_error=checked and checked["error"],
        measured_density=checked and checked["density"],
        densities=_densities(cells, chosen),
    )
    _write(result, made)
    logger.info("%s", result.summary())
    return result


@dataclass(frozen=True)
class _Cell:
    """One layer in one part of the run.

    Attributes:
        part: Index of the part.
        steps: Its steps, `range(start, stop)`, of num_steps.
        num_steps: Steps of the run.
        layer: Index of the layer.
        error: Mean error at each rung of the ladder, dense last.
        density: Mean density at each rung.
    """

    part: int
    steps: tuple[int, int]
    num_steps: int
    layer: int
    error: tuple[float, ...]
    density: tuple[float, ...]

    @property
    def weight(self) -> int:
        """Steps it stands for."""
        return self.steps[1] - self.steps[0]


class _Runs:
    """The runs of the pipeline that measure and check."""

    def __init__(
        self, pipe: Any, base: PSAPreset, parts: int, max_heads: int, seed: int, call: Mapping[str, Any]
    ) -> None:
        accepted = inspect.signature(type(pipe).__call__).parameters
        self.pipe = pipe
        self.base = base
        self.parts = parts
        self.max_heads = max_heads
        self.seed = seed
        self.call = {key: value for key, value in call.items() if key != "output_type" or key in accepted}
        self.rungs = [base.replace(mask_ratios=ladder_ratios(density, base.block_n)) for density in DENSITIES]

    def measure(self, prompts: Sequence[str], path: Path, bar: Any) -> list[_Cell]:
        """Run the pipeline dense and try every rung on what its self-attentions are given."""
        key = self._key(prompts)
        known = _read_measurements(path, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if known else "w", encoding="utf-8") as file:
            if not known:
                file.write(json.dumps({"key": key}) + "\n")
            for number, prompt in enumerate(prompts):
                if not any(entry.get("finished") == number for entry in known):
                    done = {_place(entry) for entry in known if entry.get("prompt") == number}
                    self._measure_prompt(number, prompt, done, file, known, bar)
                    known.append({"finished": number})
                    file.write(json.dumps(known[-1]) + "\n")
                bar.update()
        return self._cells([entry for entry in known if "rungs" in entry])

    def _measure_prompt(self, number: int, prompt: str, done: set, file: Any, known: list, bar: Any) -> None:
        def sink(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
            entry = {"prompt": number, "denoiser": call.denoiser, "step": call.step, "layer": call.layer}
            entry |= {"num_steps": call.num_steps, "forward": call.forward}
            if _place(entry) in done:
                return
            bar.set_postfix_str(f"step {call.step}, layer {call.layer}")
            q, k, v = self._some_heads(q, k, v)
            dense = F.scaled_dot_product_attention(q, k, v, scale=call.scale).float()
            entry["rungs"] = [_compare(q, k, v, dense, rung, call) for rung in self.rungs]
            known.append(entry)
            file.write(json.dumps(entry) + "\n")
            file.flush()

        def is_wanted(step: int, num_steps: int | None, layer: int, num_layers: int) -> bool:
            return step in self._sampled(num_steps)

        with tap_qkv(self.pipe, is_wanted, sink):
            self._run(prompt, number)

    def check(self, made: PSAPreset, prompts: Sequence[str], first: int, bar: Any) -> dict[str, float] | None:
        """Run the pipeline with the preset; mean error and density over steps, layers and prompts."""
        found: dict[str, list[float]] = {"error": [], "density": []}

        def sink(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
            here = made.at(call.step, call.num_steps, call.layer, call.num_layers)
            error, density = 0.0, 1.0
            if here.type != "dense":
                q, k, v = self._some_heads(q, k, v)
                dense = F.scaled_dot_product_attention(q, k, v, scale=call.scale).float()
                error, density = _compare(q, k, v, dense, here, call)
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
                    self._run(prompt, first + number)
            finally:
                disable_psa(self.pipe)
            bar.update()
        return {kind: sum(values) / len(values) for kind, values in found.items()} if found["error"] else None

    def _run(self, prompt: str, number: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + number)
        with torch.no_grad(), _quiet(self.pipe):
            self.pipe(**{"prompt": prompt, "generator": generator, **self.call})

    def _some_heads(self, *tensors: Tensor) -> list[Tensor]:
        """At most so many heads, spread evenly over batch and heads: `[1, heads, L, D]`."""
        count = tensors[0].shape[0] * tensors[0].shape[1]
        index = torch.linspace(0, count - 1, min(count, self.max_heads)).round().long()
        return [x.flatten(0, 1)[index.to(x.device)][None] for x in tensors]

    def _sparse_steps(self, num_steps: int | None) -> tuple[int, int]:
        if num_steps is None:
            raise RuntimeError(f"{type(self.pipe).__name__} does not tell how many steps it runs (num_timesteps)")
        start, stop = self.base.warmup_steps, num_steps - self.base.dense_last_steps
        if start >= stop:
            raise RuntimeError(
                f"nothing is sparse in a run of {num_steps} steps: the preset has warmup_steps={start} and "
                f"dense_last_steps={self.base.dense_last_steps}; calibrate with more steps or fewer dense ones"
            )
        return start, stop

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

    def _cells(self, entries: list[dict[str, Any]]) -> list[_Cell]:
        if not entries:
            raise RuntimeError(
                "nothing could be measured: no self-attention ran in a step that can be sparse. "
                "record_qkv(pipe, ...) says why"
            )
        num_steps = {entry["num_steps"] for entry in entries}
        if len(num_steps) > 1:
            raise RuntimeError(f"the runs had different numbers of steps ({sorted(num_steps)}); calibrate them apart")
        groups = defaultdict(list)
        ends = self._ends(max(num_steps))
        for entry in entries:
            part = next(part for part, (start, stop) in enumerate(ends) if start <= entry["step"] < stop)
            groups[part, entry["layer"]].append(entry["rungs"])
        cells = []
        for (part, layer), measured in sorted(groups.items()):
            error, density = torch.tensor(measured, dtype=torch.double).mean(0).T.tolist()
            cells.append(_Cell(part, ends[part], max(num_steps), layer, (*error, 0.0), (*density, 1.0)))
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


def _weights_of(denoiser: nn.Module) -> list[Any]:
    """Enough of the weights to tell another training, or a LoRA that was fused, from the same: a few of each tensor."""
    known = []
    for name, weight in denoiser.named_parameters():
        sample = []
        if weight.device.type != "meta" and weight.is_floating_point() and type(weight.data) is Tensor:
            sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // 4)][:4].float().tolist()
        known.append([name, weight.numel(), sample])
    return known


def ladder_ratios(density: float, block_n: int) -> dict[int, list[float]]:
    """Shares of a given density that read everything, in the proportions of psa_cover.

    Args:
        density: Between 1 / block_n and 1.
        block_n: Keys a block; the rest is read at this factor, at most 128.
    """
    coarsest = min(128, block_n)
    finer = [(factor, weight) for factor, weight in ((1, 1.0), (4, 1.37), (16, 1.68)) if factor < coarsest]

    def shares(full: float) -> list[tuple[int, float]]:
        left, found = 1.0, []
        for factor, weight in finer:
            found.append((factor, min(full * weight, left if factor == 1 else left / 2)))
            left -= found[-1][1]
        return [*found, (coarsest, left)]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(share / factor for factor, share in shares(middle)) < density:
            low = middle
        else:
            high = middle
    ratios, start = {}, 0.0
    for factor, share in shares(low):
        ratios[factor] = [round(start, 4), round(start + share, 4)]
        start += share
    ratios[coarsest][1] = 1.0
    return ratios


def _compare(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, preset: PSAPreset, call: Call) -> tuple[float, float]:
    """Relative L1 error and density of a preset on one call."""
    out, schedule = psa_attention(
        q,
        k,
        v,
        preset,
        grid=call.grid,
        text_tokens=call.text_tokens,
        text_first=call.text_first,
        scale=call.scale,
        return_schedule=True,
    )
    error = (out.float() - dense).abs().sum() / dense.abs().sum().clamp_min(1e-30)
    return float(error), float(schedule.density())


def _choose(cells: list[_Cell], kind: str, target: float) -> list[int]:
    """Rung of each cell: as little density (or error) as possible while the mean error (or density) is the target.

    One price for all cells first, then single cells are moved until the target leaves no room for another move.
    """
    other = "density" if kind == "error" else "error"

    def cheapest(price: float) -> list[int]:
        totals = [[y + price * x for x, y in zip(getattr(c, kind), getattr(c, other), strict=True)] for c in cells]
        return [min(range(_DENSE + 1), key=total.__getitem__) for total in totals]

    # a high price keeps the budgeted quantity small
    low, high = 1e-9, 1e9
    chosen = cheapest(high)
    if _mean(cells, chosen, kind) > target:
        least = _mean(cells, chosen, kind)
        raise ValueError(f"target_{kind}={target:g} cannot be reached: the least of the ladder is {least:.3f}")
    for _ in range(100):
        price = math.sqrt(low * high)
        candidate = cheapest(price)
        if _mean(cells, candidate, kind) <= target:
            chosen, high = candidate, price
        else:
            low = price
    return _use_what_is_left(cells, chosen, kind, other, target)


def _use_what_is_left(cells: list[_Cell], chosen: list[int], kind: str, other: str, target: float) -> list[int]:
    chosen = list(chosen)
    steps = sum(cell.weight for cell in cells)
    left = target - _mean(cells, chosen, kind)
    while True:
        best = None
        for index, cell in enumerate(cells):
            x, y, now = getattr(cell, kind), getattr(cell, other), chosen[index]
            for rung in range(_DENSE + 1):
                cost, gain = (x[rung] - x[now]) * cell.weight / steps, (y[now] - y[rung]) * cell.weight
                if gain > 1e-12 and cost <= left and (best is None or gain / max(cost, 1e-12) > best[0]):
                    best = gain / max(cost, 1e-12), index, rung, cost
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
        left -= best[3]


def _mean(cells: list[_Cell], chosen: list[int], kind: str) -> float:
    weights = sum(cell.weight for cell in cells)
    return sum(getattr(cell, kind)[rung] * cell.weight for cell, rung in zip(cells, chosen, strict=True)) / weights


def _densities(cells: list[_Cell], chosen: list[int]) -> tuple[tuple[float, ...], ...]:
    parts = defaultdict(dict)
    for cell, rung in zip(cells, chosen, strict=True):
        parts[cell.part][cell.layer] = round(cell.density[rung], 4)
    return tuple(tuple(layers[layer] for layer in sorted(layers)) for _, layers in sorted(parts.items()))


def _assemble(base: PSAPreset, name: str, cells: list[_Cell], chosen: list[int]) -> PSAPreset:
    """The preset: in each part of the run, the layers of each rung."""
    steps: dict[str, Any] = {}
    for part in sorted({cell.part for cell in cells}):
        here = [(cell, rung) for cell, rung in zip(cells, chosen, strict=True) if cell.part == part]
        by_rung = defaultdict(list)
        for cell, rung in here:
            by_rung[rung].append(cell.layer)
        changes: dict[str, Any] = {}
        sparse = {rung: layers for rung, layers in by_rung.items() if rung < _DENSE}
        if not sparse:
            changes = {"type": "dense"}
        else:
            usual = max(sparse, key=lambda rung: len(sparse[rung]))
            changes["mask_ratios"] = ladder_ratios(DENSITIES[usual], base.block_n)
            others = {rung: layers for rung, layers in sorted(sparse.items()) if rung != usual}
            if others:
                changes["layers"] = {
                    ",".join(map(str, layers)): {"mask_ratios": ladder_ratios(DENSITIES[rung], base.block_n)}
                    for rung, layers in others.items()
                }
            if _DENSE in by_rung:
                changes["dense_layers"] = ",".join(map(str, by_rung[_DENSE]))
        cell = here[0][0]
        steps[_as_shares(*cell.steps, cell.num_steps)] = changes
    return base.replace(name=name, steps=steps)


def _as_shares(start: int, stop: int, num_steps: int) -> str:
    """The steps as shares of the run, so that a run of another length is divided alike; as numbers if that is off."""
    first, last = (round(100 * step / num_steps) for step in (start, stop))
    exact = round(num_steps * first / 100) == start and round(num_steps * last / 100) == stop
    return f"{first}%:{last}%" if exact else f"{start}:{stop}"


def _write(result: Calibration, made: PSAPreset) -> None:
    usual = PSAPreset(name=made.name, model=made.model).to_dict()
    values = {key: value for key, value in made.to_dict().items() if value != usual[key] or key == "mask_ratios"}
    found = f"Calibrated: error {result.predicted_error:.3f} at density {result.predicted_density:.3f}."
    values = {"type": "psa", **values, "description": found}
    content = {result.section: {"attention_configs": {result.name: values}}}
    head = "".join(f"# {line}\n" for line in result.summary().splitlines())
    text = head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    result.path.write_text(text, encoding="utf-8")
    load_preset(result.section, result.name, config=result.path)  # what was written can be read


def _base_preset(pipe: Any, preset: str | PSAPreset | None) -> tuple[PSAPreset, str]:
    """The preset to vary, and the section of the model."""
    _, denoiser, family = find_denoisers(pipe)[0]
    section = family.section_of(denoiser, pipe)[0]
    base, _ = resolve_preset(preset or "psa_cover", None, {}, family=family, denoiser=denoiser, pipe=pipe)
    if base.type == "dense":
        raise ValueError(f"preset {base.name!r} is dense: give a sparse one to vary")
    if base.mask_mode != "topk":
        raise ValueError(f"preset {base.name!r} has mask_mode {base.mask_mode}; calibrate varies shares, mode topk")
    return base.replace(steps=None, layers=None, dense_layers=None), section


def _check_target(target_error: float | None, target_density: float | None, prompts: Sequence[str]) -> None:
    if (target_error is None) == (target_density is None):
        raise ValueError("give target_error or target_density, not both")
    for key, value in (("target_error", target_error), ("target_density", target_density)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{key} must lie in (0, 1], got {value!r}")
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one prompt")


def _read_measurements(path: Path, key: str) -> list[dict[str, Any]]:
    """Measurements of an earlier call with the same key; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    if not entries or entries[0].get("key") != key:
        logger.info("%s holds other measurements: they are replaced", path)
        return []
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return entries


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(key) for key in ("denoiser", "step", "layer", "forward"))


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, unit="prompt", desc="calibrate", disable=not progress)


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
