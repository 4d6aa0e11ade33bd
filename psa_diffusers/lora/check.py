"""Check a LoRA against the denoisers of a pipeline. Only keys and shapes are read, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from psa_diffusers.models.registry import unwrap

__all__ = ["check_lora"]

# endings of the two halves of a LoRA: the form of peft, and the older one of diffusers
_HALVES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora.down.weight": "A", "lora.up.weight": "B"}
_KEY = re.compile(
    r"(?P<component>transformer|transformer_2)\.(?P<module>.+?)\.(?P<ending>lora(_[AB]|\.down|\.up)\.\w+)"
)


def check_lora(pipe: Any, weights: Mapping[str, Tensor], source: str | Path) -> dict[str, dict[str, int]]:
    """Check the keys, ranks and shapes of a LoRA against the denoisers of a pipeline. Reads shapes only.

    Args:
        pipe: The pipeline. Its denoisers may be on the meta device.
        weights: The LoRA by key; so may these.
        source: Its name, for messages.

    Returns:
        The rank by component and module path.

    Raises:
        ValueError: If it does not fit. The message says where.
    """
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    foreign = []
    for key, weight in weights.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        elif half := _HALVES.get(match["ending"]):
            halves.setdefault((match["component"], match["module"]), {})[half] = weight
    if foreign or not halves:
        got = f"{foreign[0]!r} and {len(foreign) - 1} more of {len(weights)}" if foreign else "none at all"
        raise ValueError(
            f"{source} is not a LoRA for {type(pipe).__name__}: expected keys like "
            f"'transformer.blocks.0.attn1.to_q.lora_A.weight', got {got}. Convert it to the diffusers layout first"
        )
    modules: dict[str, dict[str, int]] = {}
    for component, module in halves:
        denoiser = getattr(pipe, component, None)
        if denoiser is None:
            raise ValueError(f"{source} has weights for {component}, which this {type(pipe).__name__} does not have")
        denoiser = unwrap(denoiser)
        problem = _mismatch(denoiser, module, halves[component, module])
        if problem:
            name = type(denoiser).__name__
            raise ValueError(f"{source} is a LoRA of another model than this {name}: {component}.{module} {problem}")
        modules.setdefault(component, {})[module] = halves[component, module]["A"].shape[0]
    return modules


def _mismatch(denoiser: nn.Module, path: str, halves: dict[str, Tensor]) -> str:
    """Say why two halves, A ``[rank, in]`` and B ``[out, rank]``, cannot be added to a module; empty if they can."""
    try:
        module = denoiser.get_submodule(path)
    except AttributeError:
        return "does not exist in it"
    if len(halves) < 2:
        return f"has only one half of a LoRA, lora_{next(iter(halves))}"
    down, up = halves["A"].shape, halves["B"].shape
    width = tuple(getattr(module, side, None) for side in ("in_features", "out_features"))
    if None in width:
        width = tuple(getattr(module, side, None) for side in ("in_channels", "out_channels"))
    if None in width:
        return f"is a {type(module).__name__}, not a linear or convolution layer"
    if down[0] != up[1]:
        return f"has halves of rank {down[0]} and {up[1]}"
    if (down[1], up[0]) != width:
        return f"has {width[0]} inputs and {width[1]} outputs, the LoRA {down[1]} and {up[0]}"
    return ""
