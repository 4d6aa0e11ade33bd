"""What to load and how to generate: the schema of `configs/models.yaml`. Scripts read it; the attention never does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from psa_diffusers.presets.files import build, builtin_file, find_name, merge, nest, read_file, reject_unknown, suggest

__all__ = ["LoraSource", "ModelConfig", "SchedulerChoice", "list_model_configs", "load_model_config"]

DTYPES = ("bfloat16", "float16", "float32")
OFFLOADS = ("none", "model", "sequential")


# the two optional parts are not frozen: OmegaConf 2.3 cannot merge into a frozen dataclass whose default is None
@dataclass
class SchedulerChoice:
    """Scheduler that replaces the one of the checkpoint: a class of diffusers, and what to change in its settings."""

    class_name: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.class_name:
            raise ValueError("scheduler needs class_name, a scheduler class of diffusers such as CogVideoXDPMScheduler")


@dataclass
class LoraSource:
    """LoRA to load: a hub id or folder, the file inside it, and its strength."""

    source: str = ""
    weight_name: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("lora needs source, a hub id or a folder")


@dataclass(frozen=True)
class ModelConfig:
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

    def replace(self, **overrides: Any) -> ModelConfig:
        """Return a copy with some fields changed, by their YAML names, checked again.

        Raises:
            ValueError: If a key is unknown or a value is not allowed.
        """
        where = f"model {self.name!r}"
        changes = nest({key: asdict(value) if isinstance(value, _PARTS) else value for key, value in overrides.items()})
        _reject_unknown_keys(changes, where, allowed=_FIELDS)
        return build(ModelConfig, merge(asdict(self), changes), where)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by their YAML names; fit for JSON and YAML."""
        return asdict(self)


_PARTS = (SchedulerChoice, LoraSource)
_FIELDS = frozenset(spec.name for spec in fields(ModelConfig))
_CONFIG_FILE = "models.yaml"


def load_model_config(name: str, config: str | Path | None = None, **overrides: Any) -> ModelConfig:
    """Return an entry of `configs/models.yaml`.

    Args:
        name: Key of the entry, upper and lower case being the same.
        config: Path of a YAML of your own, laid over the built-in file.
        **overrides: Changes by the names of the YAML.

    Raises:
        FileNotFoundError: If `config` does not exist.
        ValueError: If the entry, a key or a value is not valid. The message lists what exists.
    """
    entries = _entries(config)
    name = find_name(name, entries, "model")
    where = f"model {name!r}"
    changes = nest({key: asdict(value) if isinstance(value, _PARTS) else value for key, value in overrides.items()})
    _reject_unknown_keys(changes, where)
    return build(ModelConfig, {**merge(entries[name], changes), "name": name}, where)


def list_model_configs(config: str | Path | None = None) -> list[str]:
    """Return the keys of `configs/models.yaml`, with those of a YAML of your own."""
    return list(_entries(config))


def _entries(config: str | Path | None) -> dict[str, dict[str, Any]]:
    entries = _checked_entries(builtin_file(_CONFIG_FILE))
    if config is None:
        return entries
    known = {name.casefold(): name for name in entries}
    own = {known.get(name.casefold(), name): values for name, values in _checked_entries(config).items()}
    return merge(entries, own)


def _checked_entries(path: str | Path) -> dict[str, dict[str, Any]]:
    entries = read_file(path)
    for name, values in entries.items():
        where = f"{Path(path).name}: model {name!r}"
        if not isinstance(name, str) or not isinstance(values, dict):
            raise ValueError(f"{where} must be a name with a mapping of keys, got {values!r}")
        _reject_unknown_keys(values, where)
    return entries


def _reject_unknown_keys(values: Mapping[str, Any], where: str, allowed: frozenset[str] = _FIELDS - {"name"}) -> None:
    reject_unknown(values, allowed, where)
    for key, part in (("scheduler", SchedulerChoice), ("lora", LoraSource)):
        if isinstance(values.get(key), Mapping):
            reject_unknown(values[key], (spec.name for spec in fields(part)), f"{where}, {key}")
