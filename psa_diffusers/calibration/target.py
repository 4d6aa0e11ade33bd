"""Find, for a pipeline and prompts, how dense each layer must be in each part of the run to meet a target.

Measure, choose, write, check: the flow of a calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from psa_diffusers.calibration.assemble import assemble_preset, write_preset
from psa_diffusers.calibration.measure import Measurements
from psa_diffusers.calibration.places import check_place
from psa_diffusers.calibration.search import Kind, choose, chosen_densities, mean
from psa_diffusers.pipelines.enable import find_denoisers
from psa_diffusers.pipelines.state import state_of
from psa_diffusers.presets import PSAPreset
from psa_diffusers.presets.values import check_prompts, is_int, is_real
from psa_diffusers.processors.choice import resolve_preset

__all__ = ["Calibration", "calibrate", "check_request"]

logger = logging.getLogger("psa_diffusers")


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

    What was measured stands in a file beside the preset, `NAME.measured.jsonl`, and a second call with the same
    arguments goes on where the first one stopped; another target needs no new measurement. A file that does not fit is
    set aside under another name, with a warning that says why.

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
        OSError: If the preset cannot be written at `path`; before the pipeline runs, if that can be known.
        RuntimeError: If PSA is on, nothing could be measured, or what the pipeline computes is not finite.
        TypeError: If the pipeline has no denoiser of a known family, or no argument of that name.
        ValueError: If the target or another argument is not valid.
    """
    path = Path(path)
    kind, target = check_request(
        target_error, target_density, path=path, name=name, parts=parts, max_heads=max_heads, seed=seed
    )
    prompts = check_prompts(prompts, "prompts")
    held_out = None if held_out is None else check_prompts(held_out, "held_out", least=0)
    if state_of(pipe).switch is not None:
        raise RuntimeError("PSA is on in this pipeline; call disable_psa(pipe) before calibrate")
    base, section = _base_preset(pipe, preset)
    if held_out is None:
        cut = len(prompts) - max(1, len(prompts) // 4) if len(prompts) > 1 else 1
        prompts, held_out = prompts[:cut], prompts[cut:]
    measurements = Measurements(pipe, base, parts, max_heads, seed, {"output_type": "latent", **call})
    count = len(prompts) + len(held_out)
    with tqdm(total=count, unit="prompt", desc="calibrate", disable=not progress) as bar:
        cells = measurements.measure(prompts, path.with_name(path.name + ".measured.jsonl"), bar)
        chosen = choose(cells, kind, target)
        made = assemble_preset(base, name, cells, chosen)
        checked = measurements.check(made, held_out, len(prompts), bar)
    result = Calibration(
        path=path,
        section=section,
        name=name,
        target_error=target_error,
        target_density=target_density,
        predicted_error=mean(cells, chosen, "error"),
        predicted_density=mean(cells, chosen, "density"),
        measured_error=checked["error"] if checked else None,
        measured_density=checked["density"] if checked else None,
        densities=chosen_densities(cells, chosen),
    )
    found = f"Calibrated: error {result.predicted_error:.3f} at density {result.predicted_density:.3f}."
    write_preset(path, section, made, description=found, comment=result.summary())
    logger.info("%s", result.summary())
    return result


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


def check_request(
    target_error: float | None,
    target_density: float | None,
    *,
    path: Path,
    name: str = "calibrated",
    parts: int = 4,
    max_heads: int = 8,
    seed: int = 0,
) -> tuple[Kind, float]:
    """Check the arguments of `calibrate` that need no pipeline.

    Returns:
        Which of the two targets was given, and its value.

    Raises:
        OSError: If no file can be written at the path.
        ValueError: If an argument is not valid.
    """
    if (target_error is None) == (target_density is None):
        got = "neither" if target_error is None else "both"
        raise ValueError(f"give target_error or target_density, not both, got {got}; for example target_error=0.1")
    kind: Kind = "density" if target_error is None else "error"
    target = target_density if target_error is None else target_error
    if not (is_real(target) and 0 < target <= 1):
        raise ValueError(f"target_{kind} must lie in (0, 1], got {target!r}")
    for what, number in (("parts", parts), ("max_heads", max_heads)):
        if not (is_int(number) and number >= 1):
            raise ValueError(f"{what} must be a whole number from 1, got {number!r}")
    if not is_int(seed):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if not (isinstance(name, str) and name.strip()):
        raise ValueError(f"name must be the name of a preset, got {name!r}")
    check_place(path)
    return kind, target
