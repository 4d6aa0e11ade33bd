"""From the name of a model and of a preset to the preset: `configs/attention_config.yaml` and files of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

from psa_diffusers.presets.files import ConfigFile, builtin_file, file_version
from psa_diffusers.presets.schema import PRESET_KEYS, REPLACED, PSAPreset, make_preset
from psa_diffusers.presets.values import Keys, Named, build, find_name, suggest


@dataclass(frozen=True)
class VideoScale:
    """Pixels and frames a token stands for. Information about the model: the grid is always read from the run."""

    width_divisor: int = 16
    height_divisor: int = 16
    depth_divisor: int = 4


@dataclass(frozen=True)
class Section:
    """Everything that a file says about one model.

    Args:
        model: Name of the section.
        default_attention: Preset that is used when none is asked for.
        video_scale: Pixels and frames a token stands for. Information only.
        text_length: Text tokens the model was published with, None if the file does not say. Information only: text
            tokens are counted in the call that runs.
        presets: Preset by name; `baseline` is always there.
    """

    model: str
    default_attention: str
    video_scale: VideoScale
    text_length: int | None
    presets: dict[str, PSAPreset] = field(hash=False)


@dataclass
class _SectionValues:
    """Types of the keys of a section apart from its presets."""

    default_attention: str | None = None
    video_scale: VideoScale = field(default_factory=VideoScale)
    text_length: int | None = None


_KEYS_IN_FILE = PRESET_KEYS.without("name", "model")
_FILE = ConfigFile(
    "attention_config.yaml",
    entry="section",
    keys=Keys.of(
        _SectionValues,
        "attention_configs",
        video_scale=Keys.of(VideoScale),
        attention_configs=Named("preset", _KEYS_IN_FILE),
    ),
    whole=REPLACED,
)


def load_preset(
    model: str, name: str | None = None, *, config: str | Path | None = None, **overrides: Any
) -> PSAPreset:
    """Return a preset of a model.

    Args:
        model: Name of a section of the file, upper and lower case being the same. `default` serves models nobody knows.
        name: Name of a preset of that section; None takes the section's `default_attention`.
        config: Path of a YAML of your own. Its sections and presets are laid over the built-in file: it needs to hold
            only what is new or different.
        **overrides: Changes by the names of the YAML, `warmup_steps=0` or `block_size={"m": 64}`; dotted names work as
            well, `**{"block_size.m": 64}`. `mask_ratios` is replaced as a whole.

    Raises:
        FileNotFoundError: If `config` does not exist.
        ValueError: If the section, the preset, a key or a value is not valid. The message lists what exists.
    """
    if overrides:
        return _load_preset(model, name, config, overrides)
    # a call of psa_attention with a name comes here once a layer: 8 ms without the cache
    version = file_version(config) if config is not None else None
    return _load_preset_version(model, name, file_version(builtin_file(_FILE.name)), version)


@lru_cache(maxsize=256)
def _load_preset_version(
    model: str, name: str | None, builtin: tuple[Path, int], config: tuple[Path, int] | None
) -> PSAPreset:
    return _load_preset(model, name, config[0] if config else None, {})


def _load_preset(model: str, name: str | None, config: str | Path | None, overrides: Mapping[str, Any]) -> PSAPreset:
    sections = _FILE.entries(config)
    model = find_name(model, sections, "model section")
    presets = _presets_of(sections[model])
    if name is None:
        name = _default_attention(sections[model], model)
    if name not in presets:
        elsewhere = [section for section, values in sections.items() if name in _presets_of(values)]
        hint = f" It exists in {', '.join(elsewhere)}." if elsewhere else suggest(name, presets)
        raise ValueError(
            f"model section {model!r} has no preset {name!r}.{hint} Available: {', '.join(sorted(presets))}"
        )
    return _make_preset(model, name, presets[name], overrides)


def load_section(model: str, config: str | Path | None = None) -> Section:
    """Return everything a file says about a model; arguments and errors as in `load_preset`."""
    sections = _FILE.entries(config)
    model = find_name(model, sections, "model section")
    values = sections[model]
    described = {key: value for key, value in values.items() if key != "attention_configs"}
    typed = build(_SectionValues, described, {}, f"section {model!r}", keys=_FILE.keys)
    presets = {name: _make_preset(model, name, preset, {}) for name, preset in _presets_of(values).items()}
    default = _default_attention(values, model)
    return Section(model, default, typed.video_scale, typed.text_length, presets)


@overload
def list_presets(model: None = None, *, config: str | Path | None = None) -> dict[str, list[str]]: ...
@overload
def list_presets(model: str, *, config: str | Path | None = None) -> list[str]: ...
def list_presets(model: str | None = None, *, config: str | Path | None = None) -> list[str] | dict[str, list[str]]:
    """Return the names of a model's presets; without a model, a dict of section name to preset names.

    Raises:
        ValueError: If there is no such section.
    """
    sections = _FILE.entries(config)
    if model is None:
        return {section: list(_presets_of(values)) for section, values in sections.items()}
    model = find_name(model, sections, "model section")
    return list(_presets_of(sections[model]))


def _presets_of(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    presets = {str(name): preset for name, preset in (section.get("attention_configs") or {}).items()}
    return {"baseline": {"type": "dense", "description": "Dense attention."}, **presets}


def _default_attention(section: Mapping[str, Any], model: str) -> str:
    """The preset to use when none is asked for; a section that does not say gets its first sparse one."""
    presets = _presets_of(section)
    default = section.get("default_attention")
    if default is None:
        sparse = [name for name, preset in presets.items() if preset.get("type") != "dense"]
        return (sparse or list(presets))[0]
    if default not in presets:
        raise ValueError(
            f"section {model!r}: default_attention is {default!r}, which is none of its presets."
            f"{suggest(default, presets)} Available: {', '.join(sorted(presets))}"
        )
    return str(default)


def _make_preset(model: str, name: str, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> PSAPreset:
    values = {**values, "name": name, "model": model}
    return make_preset(values, overrides, f"preset {name!r} of {model!r}", _KEYS_IN_FILE)
