"""Entries of `configs/models.yaml`: which checkpoint to load and how to generate. The attention never reads them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from psa_diffusers.presets.files import ConfigFile
from psa_diffusers.presets.values import Keys, build, find_name, suggest

DTYPES = ("bfloat16", "float16", "float32")
OFFLOADS = ("none", "model", "sequential")


@dataclass(frozen=True)
class SchedulerChoice:
    """Scheduler that replaces the one of the checkpoint: a class of diffusers, and what to change in its settings."""

    class_name: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.class_name:
            raise ValueError("scheduler needs class_name, a scheduler class of diffusers such as CogVideoXDPMScheduler")


@dataclass(frozen=True)
class LoraSource:
    """LoRA to load: a hub id or folder, the file inside it, and its strength."""

    source: str = ""
    weight_name: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("lora needs source, a hub id or a folder")


@dataclass(frozen=True)
class ModelEntry:
    """One entry of `configs/models.yaml`. Every field and default is here and nowhere else.

    Args:
        name: Key of the entry.
        source: Hub id or folder of a diffusers checkpoint; None is the demo model of the pipeline's family, which
            ships with the package.
        pipeline: Pipeline class of diffusers; None takes the one that the checkpoint names.
        width: Of the video, in pixels.
        height: Of the video, in pixels.
        num_frames: Of the video.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 turns it off.
        guidance_scale_2: Guidance of the second expert; None passes nothing to the pipeline.
        max_sequence_length: Tokens that a prompt is padded to; None leaves it to the pipeline.
        flow_shift: Shift of the flow-matching schedule; None keeps the checkpoint's.
        scheduler: Scheduler to use; None keeps the checkpoint's.
        fps: Frames per second of the file.
        dtype: `bfloat16`, `float16` or `float32`, for everything but the VAE.
        vae_dtype: The same for the VAE; None is `dtype`.
        offload: Where idle weights wait: `none` (on the device), `model` or `sequential` (in host memory).
        vae_tiling: Decode the video tile by tile.
        vae_slicing: Decode the videos of a batch one by one.
        lora: LoRA to load.
        attention_model: Section of `configs/attention_config.yaml`; None finds it from the denoiser.
        attention_preset: Preset of that section; None takes the section's default.
        example_prompt: Prompt to use when none is given.
        negative_prompt: What the video should not show; None passes nothing to the pipeline.

    Raises:
        ValueError: If a value is out of range. The message names the key.
    """

    name: str = "custom"
    source: str | None = None
    pipeline: str | None = None
    width: int = 720
    height: int = 480
    num_frames: int = 49
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    guidance_scale_2: float | None = None
    max_sequence_length: int | None = None
    flow_shift: float | None = None
    scheduler: SchedulerChoice | None = None
    fps: int = 16
    dtype: str = "bfloat16"
    vae_dtype: str | None = None
    offload: str = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False
    lora: LoraSource | None = None
    attention_model: str | None = None
    attention_preset: str | None = None
    example_prompt: str = ""
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        for key in ("width", "height", "num_frames", "num_inference_steps", "fps", "max_sequence_length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        for key, choices in (("dtype", DTYPES), ("vae_dtype", (*DTYPES, None)), ("offload", OFFLOADS)):
            value = getattr(self, key)
            if value not in choices:
                names = [choice for choice in choices if choice is not None]
                raise ValueError(f"{key} must be one of {', '.join(names)}, got {value!r}.{suggest(value, names)}")

    def replace(self, **overrides: Any) -> ModelEntry:
        """Return a copy with some fields changed, by their YAML names, checked again.

        Raises:
            ValueError: If a key is unknown or a value is not allowed.
        """
        return build(ModelEntry, asdict(self), overrides, f"model {self.name!r}", keys=_KEYS)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by their YAML names; fit for JSON and YAML."""
        return asdict(self)


_KEYS = Keys.of(ModelEntry, scheduler=Keys.of(SchedulerChoice), lora=Keys.of(LoraSource))
_KEYS_IN_FILE = _KEYS.without("name")
_FILE = ConfigFile("models.yaml", entry="model", keys=_KEYS_IN_FILE)


def load_model_entry(name: str, config: str | Path | None = None, **overrides: Any) -> ModelEntry:
    """Return an entry of `configs/models.yaml`.

    Args:
        name: Key of the entry, upper and lower case being the same.
        config: Path of a YAML of your own, laid over the built-in file.
        **overrides: Changes by the names of the YAML.

    Raises:
        FileNotFoundError: If `config` does not exist.
        ValueError: If the entry, a key or a value is not valid. The message lists what exists.
    """
    entries = _FILE.entries(config)
    name = find_name(name, entries, "model")
    return build(ModelEntry, {**entries[name], "name": name}, overrides, f"model {name!r}", keys=_KEYS_IN_FILE)


def list_model_entries(config: str | Path | None = None) -> list[str]:
    """Return the keys of `configs/models.yaml`, with those of a YAML of your own."""
    return list(_FILE.entries(config))
