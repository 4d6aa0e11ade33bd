"""Which denoisers PSA knows, and the few facts it must know about each. A new family is one file and one test row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

Grid = tuple[int, int, int]
"""Frames, height, width in tokens."""


@dataclass(frozen=True)
class SectionRule:
    """One line of a family's table from denoiser to section of `configs/attention_config.yaml`.

    Attributes:
        section: Name of the section.
        heads: `num_attention_heads` of the published size; None if `fits` alone decides.
        layers: `num_layers` of the published size; None likewise.
        fits: Whether a denoiser with this config, in this pipeline (None if there is none), may be this model at all.
    """

    section: str
    heads: int | None
    layers: int | None
    fits: Callable[[Any, Any], bool] = lambda config, pipe: True

    def distance(self, config: Any) -> float:
        """0 for the published size, larger the further `config` is from it; a factor of two in width counts 0.7."""
        if self.heads is None or self.layers is None:
            return 0.0
        return abs(math.log(config.num_attention_heads / self.heads)) + abs(math.log(config.num_layers / self.layers))


@dataclass(frozen=True)
class Family:
    """What PSA must know about one denoiser architecture. The only per-model facts in the package.

    Attributes:
        name: For people.
        denoisers: Class names. Names, because diffusers copies classes between files.
        attentions: Regular expression for the module path of the video self-attentions.
        text_first: Whether a joint sequence has its text in front; True where there is no text in the sequence.
        read_grid: `(config, inputs of forward by name)` to the token grid, None if these inputs do not tell.
        sections: Sizes with presets of their own, the first that fits exactly wins.
        processor: `(layer, original, site)` to the family's sparse processor.
        default_processor: Attention module to the processor that diffusers would give it.
    """

    name: str
    denoisers: tuple[str, ...]
    attentions: str
    text_first: bool
    read_grid: Callable[[Any, Mapping[str, Any]], Grid | None]
    sections: Sequence[SectionRule]
    processor: Callable[..., Any]
    default_processor: Callable[[nn.Module], Any]

    def self_attentions(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to make sparse by their path, in the order of the model."""
        # blocks compiled one by one stand in a wrapper of that name
        paths = {name.replace("_orig_mod.", ""): module for name, module in denoiser.named_modules()}
        return {path: module for path, module in paths.items() if re.fullmatch(self.attentions, path)}

    def section_of(self, denoiser: nn.Module, pipe: Any = None) -> tuple[str, bool]:
        """Find the presets of a denoiser from its own config.

        Args:
            denoiser: The denoiser.
            pipe: Its pipeline, which may know of a second expert.

        Returns:
            Name of the section, and whether it was made for this very size (else it is the nearest).
        """
        config = denoiser.config
        rules = [rule for rule in self.sections if rule.fits(config, pipe)] or self.sections
        nearest = min(rules, key=lambda rule: rule.distance(config))
        return nearest.section, nearest.distance(config) == 0


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a family.

    Raises:
        ValueError: If one of its denoiser classes belongs to another family already. Nothing is registered then.
    """
    for denoiser in family.denoisers:
        if denoiser in _FAMILIES:
            raise ValueError(f"{denoiser} already belongs to the family {_FAMILIES[denoiser].name!r}")
    _FAMILIES.update(dict.fromkeys(family.denoisers, family))
    return family


def families() -> list[Family]:
    """Return the registered families, once each."""
    return list(dict.fromkeys(_FAMILIES.values()))


def unwrap(denoiser: nn.Module) -> nn.Module:
    """Return the module inside the wrapper that `torch.compile(module)` returns."""
    return getattr(denoiser, "_orig_mod", denoiser)


def find_family(denoiser: object) -> Family | None:
    """Return the family of a denoiser, by the names of its class and base classes; None if there is none."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    return None


def family_of(denoiser: nn.Module) -> Family:
    """Return the family of a denoiser, compiled or not.

    Raises:
        TypeError: If there is none. The message lists what there is.
    """
    family = find_family(unwrap(denoiser))
    if family is None:
        raise TypeError(f"PSA does not know {type(unwrap(denoiser)).__name__}. {supported()}")
    return family


def supported() -> str:
    """Return the sentence that ends every message about an unknown model."""
    known = ", ".join(f"{denoiser} ({family.name})" for denoiser, family in sorted(_FAMILIES.items()))
    return f"Supported denoisers: {known}. To add one, see docs/adding_a_model.md"
