"""Which denoisers PSA knows, and the few facts it must know about each. A new family is one file and one test row."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from psa_diffusers.pipelines.host import unwrap

Grid = tuple[int, int, int]
"""Frames, height, width in tokens."""


class Placed(NamedTuple):
    """A grid that was found among tokens of which others may stand on either side.

    Attributes:
        grid: The grid.
        first: Tokens that stand before it.
    """

    grid: Grid
    first: int


@dataclass(frozen=True)
class SectionRule:
    """One line of a family's table from denoiser to section of `configs/attention_config.yaml`.

    Attributes:
        section: Name of the section.
        heads: Heads of the published size, as `Family.read_size` counts them; None if `fits` alone decides.
        layers: Layers of the published size; None likewise.
        fits: Whether a denoiser with this config, in this pipeline (None if there is none), may be this model at all.
    """

    section: str
    heads: int | None = None
    layers: int | None = None
    fits: Callable[[Any, Any], bool] = lambda config, pipe: True

    def distance(self, size: tuple[int, int]) -> float:
        """0 for the published size, larger the further `size` is from it; a factor of two in width counts 0.7."""
        if self.heads is None or self.layers is None:
            return 0.0
        return abs(math.log(size[0] / self.heads)) + abs(math.log(size[1] / self.layers))


def read_size(config: Any) -> tuple[int, int]:
    """Heads and layers under the names that most denoisers give them."""
    return config.num_attention_heads, config.num_layers


def read_latents(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    """Latents ``[B, C, F, H, W]`` in patches of `patch_size`, three numbers, or one and `patch_size_t`."""
    latents = inputs.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    frames, height, width = (size // edge for size, edge in zip(latents.shape[2:], patch, strict=True))
    return frames, height, width


@dataclass(frozen=True)
class Family:
    """What PSA must know about one denoiser architecture. The only per-model facts in the package.

    Attributes:
        name: For people.
        denoisers: Class names. Names, because diffusers copies classes between files.
        attentions: Regular expression for the module path of the video self-attentions.
        processor: `(layer, original, site)` to the family's sparse processor, a subclass of `FamilyProcessor`.
        read_grid: `(config, inputs of forward by name)` to the token grid, None if these inputs do not tell. To a
            `Placed` one where other tokens may stand before and behind it; else they stand where `text_first` says.
        text_first: Whether a joint sequence has its text in front; True where there is no text in the sequence.
        read_text: `(config, inputs of forward by name)` to the number of valid text tokens of each sample, ``[B]``
            integers on the CPU, None if the padding is not at the end; for sequences that end in padded text.
        timesteps_rise: Whether the timestep that the denoiser is given rises from step to step, as Mochi's does.
        sections: Sizes with presets of their own, the first that fits exactly wins. None: the section `default`.
        read_size: Config to heads and layers, by which `sections` are told apart.
        make_default: `(config, path, attention)` to the processor that diffusers would give an attention of the
            denoiser; needed where the attention's class does not know (`_default_processor_cls`).
        pipelines: Class names of the diffusers pipelines that run it. For docs/models.md, as the next two.
        sparse: What runs sparse.
        dense: What runs dense although PSA is on, and why.
    """

    name: str
    denoisers: tuple[str, ...]
    attentions: str
    processor: Callable[..., Any]
    read_grid: Callable[[Any, Mapping[str, Any]], Grid | Placed | None] = read_latents
    text_first: bool = True
    read_text: Callable[[Any, Mapping[str, Any]], Tensor | None] | None = None
    timesteps_rise: bool = False
    sections: Sequence[SectionRule] = ()
    read_size: Callable[[Any], tuple[int, int]] = read_size
    make_default: Callable[[Any, str, nn.Module], Any] | None = None
    pipelines: tuple[str, ...] = ()
    sparse: str = "every video self-attention"
    dense: str = ""

    def self_attentions(self, denoiser: nn.Module) -> dict[str, Any]:
        """Return the modules to make sparse by their path, in the order of the model."""
        paths = attention_paths(denoiser)
        return {path: module for path, module in paths.items() if re.fullmatch(self.attentions, path)}

    def default_processor(self, denoiser: nn.Module, path: str, attention: Any) -> Any:
        """Return a new processor such as diffusers would give the attention at `path`."""
        if self.make_default is not None:
            return self.make_default(denoiser.config, path, attention)
        return attention._default_processor_cls()

    def section_of(self, denoiser: nn.Module, pipe: Any = None) -> tuple[str, bool]:
        """Find the presets of a denoiser from its own config.

        Args:
            denoiser: The denoiser.
            pipe: Its pipeline, which may know of a second expert.

        Returns:
            Name of the section, and whether it was made for this very size (else it is the nearest).
        """
        if not self.sections:
            return "default", True
        config, size = denoiser.config, self.read_size(denoiser.config)
        rules = [rule for rule in self.sections if rule.fits(config, pipe)] or self.sections
        nearest = min(rules, key=lambda rule: rule.distance(size))
        return nearest.section, nearest.distance(size) == 0


_FAMILIES: dict[str, Family] = {}

_FACTORISED = "its attention is split into a spatial and a temporal part, so there are no long video sequences"
_BLOCK_MASKS = "its attention is sparse already: it runs block masks of its own through FlexAttention"
_LINEAR = "its attention is linear: there are no scores that could be left out"
CANNOT_GAIN = {
    "AnyFlowFARTransformer3DModel": "it generates frame by frame with a causal block mask and a cache of keys",
    "I2VGenXLUNet": _FACTORISED,
    "Kandinsky6SRTransformer3DModel": _BLOCK_MASKS,
    "LatteTransformer3DModel": _FACTORISED,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR,
    "UNet3DConditionModel": _FACTORISED,
    "UNetMotionModel": _FACTORISED,
    "UNetSpatioTemporalConditionModel": _FACTORISED,
    "WanAnimate2Transformer3DModel": _BLOCK_MASKS,
}
"""Video denoisers that PSA cannot make faster, and why."""


def attention_paths(denoiser: nn.Module) -> dict[str, Any]:
    """Return all modules by path, as if no block had been compiled on its own."""
    return {name.replace("_orig_mod.", ""): module for name, module in denoiser.named_modules()}


def make_instance_of(upstream: str) -> Callable[[Any, str, nn.Module], Any]:
    """Return a `Family.make_default` where all attentions have one processor class of diffusers, imported when needed.

    Args:
        upstream: Module and name of the class, with dots.
    """
    module, name = upstream.rsplit(".", 1)
    return lambda config, path, attention: getattr(importlib.import_module(module), name)()


def register_family(family: Family) -> Family:
    """Teach PSA a denoiser architecture; `enable_psa` then knows every pipeline that has such a denoiser.

    Args:
        family: What there is to know. docs/developer/adding_a_model.md shows one.

    Returns:
        The family, so that a module can keep it.

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
        raise TypeError(f"PSA does not know {type(unwrap(denoiser)).__name__}. {supported([denoiser])}")
    return family


def supported(refused: Iterable[object] = ()) -> str:
    """Return the sentences that end every message about an unknown model.

    Args:
        refused: What is unknown. If PSA cannot help one of these denoisers, the sentence says why; else it lists what
            PSA knows.
    """
    for denoiser in refused:
        for cls in type(unwrap(denoiser)).__mro__:
            if cls.__name__ in CANNOT_GAIN:
                return f"PSA cannot make {cls.__name__} faster: {CANNOT_GAIN[cls.__name__]}"
    known = ", ".join(f"{denoiser} ({family.name})" for denoiser, family in sorted(_FAMILIES.items()))
    return f"Supported denoisers: {known}. To add one, see docs/developer/adding_a_model.md"
