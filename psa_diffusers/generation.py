"""From a prompt to a file: load a pipeline as `configs/models.yaml` says, generate, write the video and its record.

What the scripts share. Attention itself never imports this room.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psa_diffusers.lora import load_psa_lora
from psa_diffusers.pipeline import disable_psa, enable_psa
from psa_diffusers.preset import PSAPreset, load_preset
from psa_diffusers.report import SWITCH, psa_report
from psa_diffusers.run_config import LoraSource, ModelConfig, list_model_configs, load_model_config

__all__ = [
    "Run",
    "compare_videos",
    "generate",
    "load_pipeline",
    "output_name",
    "resolve_model",
    "write_json",
    "write_video",
]


def resolve_model(model: str, config: str | Path | None = None) -> ModelConfig:
    """Find what `--model` means: a key of models.yaml, a folder with a saved pipeline, or a hub id ``owner/name``.

    A folder or hub id has no entry, so sizes and steps are those of the pipeline itself unless they are given.

    Raises:
        ValueError: If it is none of the three. The message lists the keys.
    """
    keys = list_model_configs(config)
    if model.casefold() in map(str.casefold, keys):
        return load_model_config(model, config)
    if (Path(model).expanduser() / "model_index.json").is_file() or re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        return ModelConfig(name="custom", source=str(model), dtype=dtype)
    raise ValueError(
        f"--model {model!r} is no entry of models.yaml, no folder with a saved pipeline (model_index.json) and no hub id "
        f"owner/name. Entries: {', '.join(keys)}"
    )


def load_pipeline(config: ModelConfig, *, device: str, lora: LoraSource | None = None) -> Any:
    """Load a pipeline, its scheduler and LoRA, and put it where its weights should wait.

    Args:
        config: What to load; ``source`` None is the demo model, which is built here.
        device: Where to run.
        lora: LoRA to load in place of the entry's own.
    """
    if config.source is None:
        from psa_diffusers.demo import build_demo_pipeline

        pipe = build_demo_pipeline()
    else:
        import diffusers

        kind = getattr(diffusers, config.pipeline) if config.pipeline else diffusers.DiffusionPipeline
        dtypes = {"default": getattr(torch, config.dtype)}
        if config.vae_dtype:
            dtypes["vae"] = getattr(torch, config.vae_dtype)
        pipe = kind.from_pretrained(config.source, torch_dtype=dtypes if len(dtypes) > 1 else dtypes["default"])
    if config.scheduler is not None:
        import diffusers

        kind = getattr(diffusers, config.scheduler.class_name)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **config.scheduler.kwargs)
    if config.flow_shift is not None:
        key = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{key: config.flow_shift})
    lora = lora or config.lora
    if lora is not None:
        load_psa_lora(pipe, lora.source, weight_name=lora.weight_name, scale=lora.scale)
    if config.vae_tiling and hasattr(pipe, "vae"):
        pipe.vae.enable_tiling()
    if config.vae_slicing and hasattr(pipe, "vae"):
        pipe.vae.enable_slicing()
    if config.offload == "model" and device != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential" and device != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


@dataclass(frozen=True)
class Run:
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
) -> Run:
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
    """
    overrides = dict(overrides or {})
    if use_psa:
        if section is not None and not isinstance(preset, PSAPreset):
            preset, overrides = load_preset(section, preset, config=config, **overrides), {}
        enable_psa(pipe, preset, config=config, report=True, **overrides)
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np", **call}
    ends: list[float] = []
    if "callback_on_step_end" in parameters:

        def note_time(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            _wait_for(pipe)
            ends.append(time.perf_counter())
            return values

        arguments["callback_on_step_end"] = note_time
    try:
        start = time.perf_counter()
        frames = np.asarray(pipe(**arguments).frames[0], dtype=np.float32)
        seconds = time.perf_counter() - start
        run = Run(frames, seconds, ends[-1] - start if ends else None)
        if not use_psa:
            return run
        report = psa_report(pipe)
        densities = [record["density"] for record in report.records]
        sparse = [record["density"] for record in report.records if record["kind"] == "sparse"]
        return Run(
            frames,
            seconds,
            run.denoising_seconds,
            density=sum(densities) / len(densities) if densities else None,
            sparse_density=sum(sparse) / len(sparse) if sparse else None,
            report=report.summary(),
            preset=getattr(pipe, SWITCH).run.preset.to_dict(),
        )
    finally:
        disable_psa(pipe)


def _wait_for(pipe: Any) -> None:
    if torch.cuda.is_available() and pipe._execution_device.type == "cuda":
        torch.cuda.synchronize()


def compare_videos(video: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """PSNR in dB and SSIM of a video against another of its shape ``[frames, height, width, 3]``, values in [0, 1]."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError as error:
        raise ImportError("PSNR and SSIM need torchmetrics: pip install 'psa_diffusers[metrics]'") from error
    first, second = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (video, reference))
    error = float((first - second).square().mean())
    psnr = 99.0 if error == 0 else min(99.0, -10 * np.log10(error).item())  # JSON knows no infinity
    return {"psnr": round(psnr, 2), "ssim": round(float(ssim(first, second, data_range=1.0)), 4)}


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write an .mp4; a file that exists under the final name is always whole."""
    from diffusers.utils import export_to_video

    part = path.with_name(f".{path.stem}.part.mp4")
    export_to_video(list(frames), str(part), fps=fps, macro_block_size=2)
    part.replace(path)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record in one move: its existence says that the run is finished."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    part.replace(path)


def output_name(index: int, prompt: str, seed: int, settings: Mapping[str, Any]) -> str:
    """Name of the files of one prompt: the same settings give the same name, other settings another."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "prompt"
    digest = hashlib.sha256(json.dumps([prompt, settings], sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{index:03d}-{words}-seed{seed}-{digest}"


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and commit, as far as they can be known."""
    names = ("psa_diffusers", "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    try:
        root = Path(__file__).resolve().parent.parent
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        commit = None
    chip = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"python": platform.python_version(), "versions": versions, "commit": commit, "device": device, "chip": chip}
