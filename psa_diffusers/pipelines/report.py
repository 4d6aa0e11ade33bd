"""What ran sparse, how dense, and why not: the records of one run, their summary and their picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from psa_diffusers.pipelines.state import state_of
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.recorder import Recorder
from psa_diffusers.processors.standalone import PSAProcessor

__all__ = ["PSAReport", "psa_report"]


class PSAReport:
    """What the self-attentions of the last run did.

    Attributes:
        title: What was enabled, one line.
        records: One dict per call of a self-attention, in order: `step` (from 0), `denoiser` and `layer` (names),
            `kind` (`sparse` or `dense`), `reason` (why dense, or why sparse without a level map that `refresh_every`
            could keep; else empty), `density` (share of the dense work, 1.0 if dense), `kept` (whether the level map is
            that of an earlier step), `tokens` (of the sequence, text included), `grid` (frames, height, width in
            tokens, None if it could not be read).
    """

    def __init__(self, title: str, records: list[dict[str, Any]]) -> None:
        self.title = title
        self.records = records

    def __repr__(self) -> str:
        return f"PSAReport({len(self.records)} calls; summary() tells more)"

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a few lines per denoiser: calls, densities, level maps that were kept, and reasons."""
        lines = [self.title]
        if not self.records:
            lines.append("no self-attention has run since PSA was enabled")
        for denoiser, records in _group(self.records, "denoiser").items():
            calls = _plural(len(records), "call")
            sparse = [record["density"] for record in records if record["kind"] == "sparse"]
            steps = len({record["step"] for record in records})
            layers = len({record["layer"] for record in records})
            kinds = f"{len(sparse)} sparse, {len(records) - len(sparse)} dense"
            lines.append(f"{denoiser}: {calls} in {_plural(steps, 'step')} and {_plural(layers, 'layer')}: {kinds}")
            overall = _mean(record["density"] for record in records)
            if sparse:
                lines.append(f"  density {_mean(sparse):.3f} where sparse, {overall:.3f} over all calls")
            else:
                lines.append(f"  density {overall:.3f}: nothing ran sparse")
            if kept := sum(record["kept"] for record in records):
                lines.append(f"  level map of an earlier step in {_plural(kept, 'call')}")
            shapes = Counter((record["grid"], record["tokens"]) for record in records)
            for (grid, tokens), _ in shapes.most_common(3):
                lines.append(f"  {tokens} tokens, grid {' x '.join(map(str, grid)) if grid else 'unknown'}")
            reasons = Counter((record["kind"], record["reason"]) for record in records if record["reason"])
            what = {"dense": "dense", "sparse": "level map not kept"}
            lines += [f"  {what[kind]} in {_plural(n, 'call')}: {why}" for (kind, why), n in reasons.most_common()]
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw density over steps and layers, a panel per denoiser; the calls of one step (guidance) are averaged.

        Args:
            path: Where to save the picture; its suffix decides the format. None saves nothing.

        Returns:
            The matplotlib `Figure`.

        Raises:
            ImportError: If matplotlib is not installed.
            RuntimeError: If there is nothing to draw.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("PSAReport.plot needs matplotlib: pip install matplotlib") from error
        if not self.records:
            raise RuntimeError("the report is empty: run the pipeline first, then call psa_report(pipe).plot()")

        panels = _group(self.records, "denoiser")
        figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        num_steps = max(record["step"] for record in self.records) + 1
        for axis, (denoiser, records) in zip(axes, panels.items(), strict=True):
            layers = list(dict.fromkeys(record["layer"] for record in records))
            cells = defaultdict(list)
            for record in records:
                cells[layers.index(record["layer"]), record["step"]].append(record["density"])
            field = torch.full((len(layers), num_steps), float("nan"))
            for place, densities in cells.items():
                field[place] = _mean(densities)
            image = axis.imshow(field.numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", cmap="viridis")
            axis.set(title=denoiser, xlabel="denoising step", ylabel="layer")
            figure.colorbar(image, ax=axis, label="density (1 = dense)")
        figure.suptitle(self.title, fontsize="small", wrap=True)
        if path is not None:
            figure.savefig(path)
        return figure


def psa_report(pipe: Any) -> PSAReport:
    """Return what each self-attention did in the last call of a pipeline (or the last run of a bare denoiser).

    Args:
        pipe: A pipeline after `enable_psa(pipe, report=True)`, or a pipeline or denoiser with a
            `PSAProcessor(report=True)`. Reading the report synchronises the device; recording does not.

    Returns:
        A copy: later runs do not change it.

    Raises:
        RuntimeError: If nothing was recorded because `report=True` was not given, or PSA is off.
    """
    recorders = _recorders(pipe)
    if not recorders:
        raise RuntimeError(
            "there is no report for this pipeline: recording is off unless asked for. Call disable_psa(pipe) if PSA is "
            "on, then enable_psa(pipe, report=True), run the pipeline, and ask for the report while PSA is on"
        )
    records = [dict(entry) for recorder in recorders for entry in recorder.entries]
    waiting = [record for record in records if isinstance(record["density"], torch.Tensor)]
    by_device = _group(({"device": r["density"].device, "record": r} for r in waiting), "device")
    for group in by_device.values():  # one transfer a device, not one a record
        values = torch.stack([entry["record"]["density"].float() for entry in group]).tolist()
        for entry, value in zip(group, values, strict=True):
            entry["record"]["density"] = value
    return PSAReport("\n".join(dict.fromkeys(recorder.title for recorder in recorders)), records)


def _recorders(pipe: Any) -> list[Recorder]:
    if (switch := state_of(pipe).switch) is not None:
        return switch.recorders
    # denoisers that got their processors without this pipeline
    components = getattr(pipe, "components", None) or {"denoiser": pipe}
    modules = [module for module in components.values() if isinstance(module, torch.nn.Module)]
    processors = [getattr(part, "processor", None) for module in modules for part in module.modules()]
    ours = [each for each in processors if isinstance(each, (FamilyProcessor, PSAProcessor))]
    return list(dict.fromkeys(recorder for processor in ours for recorder in processor.recorders))


def _group(records: Iterable[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
