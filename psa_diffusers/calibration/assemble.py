"""From the chosen densities to a preset, and to the file that holds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from psa_diffusers.calibration.ladder import DENSE, DENSITIES, ladder_ratios
from psa_diffusers.calibration.places import write_whole
from psa_diffusers.calibration.search import Cell
from psa_diffusers.presets import PSAPreset, load_preset

__all__ = ["assemble_preset", "write_preset"]


def assemble_preset(base: PSAPreset, name: str, cells: Sequence[Cell], chosen: Sequence[int]) -> PSAPreset:
    """Make the preset of a choice: in each part of the run, the layers of each rung.

    Args:
        base: What it is made from.
        name: Its name.
        cells: The layers in the parts of the run.
        chosen: The rung of each.
    """
    steps: dict[str, Any] = {}
    for part in sorted({cell.part for cell in cells}):
        here = [(cell, rung) for cell, rung in zip(cells, chosen, strict=True) if cell.part == part]
        by_rung: defaultdict[int, list[int]] = defaultdict(list)
        for cell, rung in here:
            by_rung[rung].append(cell.layer)
        changes: dict[str, Any] = {}
        sparse = {rung: layers for rung, layers in by_rung.items() if rung < DENSE}
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
            if DENSE in by_rung:
                changes["dense_layers"] = ",".join(map(str, by_rung[DENSE]))
        cell = here[0][0]
        steps[_as_shares(*cell.steps, cell.num_steps)] = changes
    return base.replace(name=name, steps=steps)


def _as_shares(start: int, stop: int, num_steps: int) -> str:
    """The steps as shares of the run, so that a run of another length is divided alike; as numbers if that is off."""
    first, last = (round(100 * step / num_steps) for step in (start, stop))
    exact = round(num_steps * first / 100) == start and round(num_steps * last / 100) == stop
    return f"{first}%:{last}%" if exact else f"{start}:{stop}"


def write_preset(path: Path, section: str, made: PSAPreset, *, description: str, comment: str) -> None:
    """Write a preset into a YAML file of its own, for `config=`, and read it back as a check.

    Args:
        path: The file.
        section: Section of the model.
        made: The preset.
        description: Its description in the file.
        comment: Lines for the head of the file.
    """
    usual = PSAPreset(name=made.name, model=made.model).to_dict()
    values = {key: value for key, value in made.to_dict().items() if value != usual[key] or key == "mask_ratios"}
    values = {"type": "psa", **values, "description": description}
    content = {section: {"attention_configs": {made.name: values}}}
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    text = head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    write_whole(path, text)
    load_preset(section, made.name, config=path)
