"""From a prompt to a file: load a pipeline as `configs/models.yaml` says, generate, write the video and its record.

What the commands share. Attention itself never imports this room.
"""

from __future__ import annotations

import inspect
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psa_diffusers.cli.classes import diffusers_class, scheduler_class, shifted
from psa_diffusers.cli.demo import FAMILIES, build_demo_pipeline, demo_lora
from psa_diffusers.cli.outputs import write_json, write_video
from psa_diffusers.lora import load_psa_lora
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.pipelines.state import state_of
from psa_diffusers.presets import LoraSource, ModelEntry, PSAPreset, list_model_entries, load_model_entry, load_preset
from psa_diffusers.presets.values import suggest

__all__ = [
    "Generated",
    "call_defaults",
    "check_metrics",
    "compare_videos",
    "device_of_process",
    "environment",
    "generate",
    "load_pipeline",
    "plain_config",
    "preset_for",
    "resolve_model",
    "revision",
    "text_length",
    "write_json",
    "write_video",
]


def device_of_process() -> str:
    """Return the device to run on: of several processes that were launched together, each has its own GPU."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").casefold() == "true":
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")  # set by accelerate launch and torchrun
    return "cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}"


def resolve_model(model: str, config: str | Path | None = None) -> ModelEntry:
    """Find what `--model` means: a key of models.yaml, a folder with a saved pipeline, or a hub id ``owner/name``.

    A folder or hub id has no entry, so sizes and steps are those of the pipeline itself unless they are given.

    Raises:
        ValueError: If it is none of the three. The message lists the keys.
    """
    keys = list_model_entries(config)
    if model.casefold() in map(str.casefold, keys):
        return load_model_entry(model, config)
    if (Path(model).expanduser() / "model_index.json").is_file() or re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        return ModelEntry(name="custom", source=str(model), dtype=dtype)
    raise ValueError(
        f"--model {model!r} is no entry of models.yaml, no folder with a saved pipeline "
        f"(model_index.json) and no hub id owner/name. Entries: {', '.join(keys)}"
    )


def load_pipeline(entry: ModelEntry, *, device: str, lora: LoraSource | None = None) -> Any:
    """Load a pipeline, its scheduler and LoRA, and put it where its weights should wait.

    Args:
        entry: What to load; ``source`` None is the demo model of the pipeline's family.
        device: Where to run.
        lora: LoRA to load in place of the entry's own.

    Raises:
        ValueError: If the entry names a class that diffusers does not have, or a setting that nothing would read.
    """
    scheduler = scheduler_class(entry.scheduler) if entry.scheduler else None  # before the weights take their time
    if entry.source is None:
        families = {pipeline: family for family, pipeline in FAMILIES.items()}
        pipeline = entry.pipeline or FAMILIES["cogvideox"]
        if pipeline not in families:
            raise ValueError(
                f"model {entry.name!r}: without source it is a demo model, and pipeline must be one of "
                f"{', '.join(families)}, got {pipeline!r}.{suggest(pipeline, families)}"
            )
        pipe: Any = build_demo_pipeline(family=families[pipeline])
    else:
        import diffusers

        kind: Any = diffusers.DiffusionPipeline
        if entry.pipeline:
            kind = diffusers_class(entry.pipeline, "Pipeline", diffusers.DiffusionPipeline)
        dtypes = {"default": getattr(torch, entry.dtype)}
        if entry.vae_dtype:
            dtypes["vae"] = getattr(torch, entry.vae_dtype)
        # the new name is ignored before 0.41, the old one warned about since
        version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
        name = "dtype" if version >= (0, 41) else "torch_dtype"
        dtype = dtypes if len(dtypes) > 1 else dtypes["default"]
        # weights of other formats may hold code
        pipe = kind.from_pretrained(entry.source, use_safetensors=True, trust_remote_code=False, **{name: dtype})
    if scheduler is not None and entry.scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **entry.scheduler.kwargs)
    if entry.flow_shift is not None:
        pipe.scheduler = shifted(pipe.scheduler, entry.flow_shift)
    lora = lora or entry.lora
    if lora is not None:
        source = demo_lora() if lora.source == "demo" else lora.source
        load_psa_lora(pipe, source, weight_name=lora.weight_name, scale=lora.scale)
    if entry.vae_tiling and hasattr(pipe, "vae"):
        pipe.vae.enable_tiling()
    if entry.vae_slicing and hasattr(pipe, "vae"):
        pipe.vae.enable_slicing()
    if entry.offload == "model" and device != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    elif entry.offload == "sequential" and device != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


@dataclass(frozen=True)
class Generated:
    """A generated video and what there is to say about it.

    Attributes:
        frames: ``[frames, height, width, 3]`` float in [0, 1].
        seconds: Of the whole call: text encoding, denoising, decoding.
        denoising_seconds: To the end of the last step; None if the pipeline has no step callback.
        density: Mean density over all self-attention calls, dense steps as 1; None without PSA.
        sparse_density: Mean density of the sparse calls; None if there were none.
        report: Summary of what ran, None without PSA.
        preset: The preset in full, None without PSA.
    """

    frames: np.ndarray
    seconds: float
    denoising_seconds: float | None
    density: float | None = None
    sparse_density: float | None = None
    report: str | None = None
    preset: dict[str, Any] | None = None


def generate(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    seed: int,
    use_psa: bool = False,
    preset: str | PSAPreset | None = None,
    section: str | None = None,
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Generated:
    """Generate one video, dense or with PSA. The pipeline is afterwards as it was before.

    Args:
        pipe: The pipeline, with PSA off.
        call: Arguments of the pipeline's call: prompt, sizes, steps, guidance.
        seed: Of the generator that draws the noise; the global one is not touched.
        use_psa: Whether to switch PSA on for this call.
        preset: Name, object, or None for the model's default.
        section: Section of the preset file; None finds it from the denoiser.
        config: The user's own preset file.
        overrides: Preset fields by their YAML names.

    Raises:
        ValueError: If the last latents or the frames hold NaN or inf.
    """
    chosen = _enable(pipe, preset, section, config, overrides) if use_psa else None
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np", **call}
    arguments = text_length(pipe) | arguments
    ends: list[float] = []
    latents: Any = None
    if "callback_on_step_end" in parameters:

        def note_time(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal latents
            _wait_for(pipe)
            latents = values.get("latents")
            ends.append(time.perf_counter())
            return values

        arguments["callback_on_step_end"] = note_time
    try:
        start = time.perf_counter()
        frames = np.asarray(pipe(**arguments).frames[0], dtype=np.float32)
        seconds = time.perf_counter() - start
        _check_finite(pipe, latents, frames)
        made = Generated(frames, seconds, ends[-1] - start if ends else None)
        if chosen is None:
            return made
        report = psa_report(pipe)
        densities = [record["density"] for record in report.records]
        sparse = [record["density"] for record in report.records if record["kind"] == "sparse"]
        return replace(
            made,
            density=sum(densities) / len(densities) if densities else None,
            sparse_density=sum(sparse) / len(sparse) if sparse else None,
            report=report.summary(),
            preset=chosen.to_dict(),
        )
    finally:
        disable_psa(pipe)


def _check_finite(pipe: Any, latents: torch.Tensor | None, frames: np.ndarray) -> None:
    """Raise a ValueError if the end of a run is not finite: it would be a black video."""
    bad = []
    if latents is not None and not torch.isfinite(latents).all():
        bad.append("the latents after the last step")
    if wrong := sum(not np.isfinite(frame).all() for frame in frames):
        bad.append(f"{wrong} of {len(frames)} frames")
    if bad:
        dtype = str(pipe.dtype).removeprefix("torch.")
        where = "" if len(bad) == 2 or "latents" in bad[0] else "; the latents are finite, so it is the VAE"
        raise ValueError(
            f"{' and '.join(bad)} hold NaN or inf{where}. Likely causes: the dtype, {dtype} (float16 overflows where "
            "bfloat16 does not, and some VAEs need float32: dtype and vae_dtype in models.yaml); the LoRA or its scale "
            "(try without); the attention preset (try another, or dense)"
        )


def preset_for(
    pipe: Any,
    preset: str | PSAPreset | None = None,
    *,
    section: str | None = None,
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> PSAPreset:
    """Return the preset that `generate` would use, and change nothing. Arguments as there.

    Raises:
        TypeError: If PSA does not know the denoiser.
        ValueError: If there is no such preset, or an override is wrong.
    """
    chosen = _enable(pipe, preset, section, config, overrides)
    disable_psa(pipe)
    return chosen


def _enable(
    pipe: Any,
    preset: str | PSAPreset | None,
    section: str | None,
    config: str | Path | None,
    overrides: Mapping[str, Any] | None,
) -> PSAPreset:
    """Switch PSA on, and return the preset that it runs with."""
    changes = dict(overrides or {})
    if section is not None and not isinstance(preset, PSAPreset):
        preset, changes = load_preset(section, preset, config=config, **changes), {}
    enable_psa(pipe, preset, config=config, report=True, **changes)
    switch = state_of(pipe).switch
    assert switch is not None, "enable_psa has set it"
    return switch.run.preset


def call_defaults(pipe: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the values that the pipeline's own call gives to those of `names` that are not passed, None left out."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: parameters[name].default for name in names if name in parameters}
    return {name: value for name, value in defaults.items() if value not in (None, inspect.Parameter.empty)}


def text_length(pipe: Any) -> dict[str, int]:
    """Return the text length of the denoiser as an argument of the pipeline's call, nothing where it has none.

    A joint sequence has the text length of the denoiser, whatever the pipeline assumes.
    """
    length = getattr(getattr(pipe, "transformer", None), "config", {}).get("max_text_seq_length")
    takes_it = "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters
    return {"max_sequence_length": length} if length and takes_it else {}


def plain_config(part: Any) -> dict[str, Any]:
    """Return the settings of a scheduler or model without the keys that diffusers keeps for itself."""
    return {key: value for key, value in part.config.items() if not key.startswith("_")}


def revision(pipe: Any) -> str | None:
    """Return the commit of the hub repository that the weights came from, None if they did not come from there."""
    for part in pipe.components.values():
        path = str(getattr(getattr(part, "config", None), "_name_or_path", ""))
        if found := re.search(r"snapshots[/\\]([0-9a-f]{40})", path):
            return found[1]
    return None


def _wait_for(pipe: Any) -> None:
    if torch.cuda.is_available() and pipe._execution_device.type == "cuda":
        torch.cuda.synchronize()


def check_metrics() -> None:
    """Raise an ImportError that says what to do if the library of the metrics is missing."""
    if find_spec("torchmetrics") is None:
        raise ImportError("PSNR and SSIM need torchmetrics: pip install 'psa_diffusers[metrics]'")


def compare_videos(video: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """PSNR in dB and SSIM of a video against another of its shape ``[frames, height, width, 3]``, values in [0, 1]."""
    check_metrics()
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    first, second = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (video, reference))
    error = float((first - second).square().mean())
    psnr = 99.0 if error == 0 else min(99.0, -10 * np.log10(error).item())  # JSON knows no infinity
    similarity: Any = ssim(first, second, data_range=1.0)
    return {"psnr": round(psnr, 2), "ssim": round(float(similarity), 4)}


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and commit, as far as they can be known."""
    names = ("psa_diffusers", "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "numpy")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():  # not the repository of somebody who installed us somewhere inside it
        try:
            asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
            commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
        except OSError:
            pass
    chip = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"python": platform.python_version(), "versions": versions, "commit": commit, "device": device, "chip": chip}
