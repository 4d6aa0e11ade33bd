"""From what the user asked for to the preset of a denoiser, or an error that says what there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from psa_diffusers.models.registry import Family
from psa_diffusers.presets import PSAPreset, list_presets, load_preset

_WRONG_KIND = "preset must be a name, a PSAPreset or None (the default of the model), got a {}"


def resolve_preset(
    preset: str | PSAPreset | None,
    config: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    family: Family,
    denoiser: nn.Module,
    pipe: Any = None,
) -> tuple[PSAPreset, str]:
    """Find the preset for a denoiser by its own config.

    Args:
        preset: Name, preset, or None for the default of the denoiser's section.
        config: The user's own YAML.
        overrides: Preset fields by their YAML names.
        family: Family of the denoiser.
        denoiser: The denoiser.
        pipe: Its pipeline, if there is one.

    Returns:
        The preset, and one line that says where it came from.

    Raises:
        TypeError: If `preset` is something else.
        ValueError: If there is no such preset, or an override is wrong.
    """
    if isinstance(preset, PSAPreset):
        return (preset.replace(**overrides) if overrides else preset), f"PSA preset {preset.name!r}, given as an object"
    if preset is not None and not isinstance(preset, str):
        raise TypeError(_WRONG_KIND.format(type(preset).__name__))
    section, is_exact = family.section_of(denoiser, pipe)
    resolved = load_preset(section, preset, config=config, **overrides)
    title = f"PSA preset {resolved.name!r} of section {section}"
    if not is_exact:
        heads, layers = family.read_size(denoiser.config)
        title += f", the nearest one: no section was made for {heads} heads and {layers} layers"
    return resolved, title


def check_choice(preset: str | PSAPreset | None, config: str | Path | None, overrides: Mapping[str, Any]) -> None:
    """Refuse now what could not work for any model, rather than in the middle of a forward."""
    if isinstance(preset, PSAPreset):
        preset.replace(**overrides)
        return
    if preset is not None and not isinstance(preset, str):
        raise TypeError(_WRONG_KIND.format(type(preset).__name__))
    by_section = list_presets(config=config)
    section = "default"
    if preset is not None:
        sections = [section for section, names in by_section.items() if preset.casefold() in map(str.casefold, names)]
        if not sections:
            names = ", ".join(sorted({name for names in by_section.values() for name in names}))
            raise ValueError(f"no model has a preset {preset!r}. Available: {names}")
        section = sections[0]
    load_preset(section, preset, config=config, **overrides)
