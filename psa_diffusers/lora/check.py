"""Check a LoRA against the denoisers of a pipeline. Nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.pipelines.host import unwrap

__all__ = ["Change", "changes_of", "check_lora", "check_values", "is_diffusers_key"]

# endings of the parts of a LoRA: the form of peft, and the older one of diffusers
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora.up.bias": "bias",
}
_KEY = re.compile(
    rf"(?P<component>transformer|transformer_2)\.(?P<module>.+?)\.(?P<ending>{'|'.join(map(re.escape, _PARTS))})"
)


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to one module.

    Attributes:
        down: The half A, ``[rank, in]``, for a convolution with its kernel.
        up: The half B, ``[out, rank]``.
        bias: Added to the output, ``[out]``; None for none.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.down.shape[0]


def is_diffusers_key(key: str) -> bool:
    """Return whether a key is of the layout of diffusers."""
    return _KEY.fullmatch(key) is not None


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
    changes = changes_of(pipe, weights, source)
    return {name: {module: change.rank for module, change in each.items()} for name, each in changes.items()}


def changes_of(pipe: Any, weights: Mapping[str, Tensor], source: str | Path) -> dict[str, dict[str, Change]]:
    """Return the changes of a LoRA by component and module path, checked as `check_lora` does."""
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    foreign = []
    for key, weight in weights.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
            continue
        those = parts.setdefault((match["component"], match["module"]), {})
        if _PARTS[match["ending"]] in those:
            raise ValueError(f"{source} has the weights of {key!r} twice, in two forms")
        those[_PARTS[match["ending"]]] = weight
    if foreign or not parts:
        got = f"{foreign[0]!r} and {len(foreign) - 1} more of {len(weights)}" if foreign else "none at all"
        raise ValueError(
            f"{source} is not a LoRA for {type(pipe).__name__}: expected keys like "
            f"'transformer.blocks.0.attn1.to_q.lora_A.weight', got {got}. Convert it to the diffusers layout first"
        )
    changes: dict[str, dict[str, Change]] = {}
    for (component, module), those in parts.items():
        denoiser = getattr(pipe, component, None)
        if denoiser is None:
            raise ValueError(f"{source} has weights for {component}, which this {type(pipe).__name__} does not have")
        denoiser = unwrap(denoiser)
        problem = _mismatch(denoiser, module, those)
        if problem:
            name = type(denoiser).__name__
            raise ValueError(f"{source} is a LoRA of another model than this {name}: {component}.{module} {problem}")
        changes.setdefault(component, {})[module] = Change(those["A"], those["B"], those.get("bias"))
    return changes


def check_values(
    denoiser: nn.Module, changes: Mapping[str, Change], scalings: Mapping[str, float], source: str | Path
) -> None:
    """Check that every number of a LoRA is finite, also in the type that the denoiser computes in.

    Args:
        denoiser: The denoiser.
        changes: What the LoRA adds to its modules.
        scalings: What the changes are multiplied by.
        source: Its name, for messages.

    Raises:
        ValueError: If one is not. The message says which.
    """
    for module, change in changes.items():
        weight = getattr(denoiser.get_submodule(module), "weight", None)
        dtype = torch.float32
        # weights of a byte are those of a quantised layer, which computes in another type
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
            dtype = weight.dtype
        largest = torch.finfo(dtype).max
        for name, values in (("lora_A", change.down), ("lora_B", change.up), ("lora_B.bias", change.bias)):
            if values is not None and not _is_within(values, largest):
                raise ValueError(
                    f"{source} has NaN, infinity or numbers too large for {dtype} in {module}.{name}: the file is "
                    "damaged, or its training failed"
                )
        if not abs(scalings[module]) <= largest:
            raise ValueError(
                f"{source} changes {module} with the strength {scalings[module]:g}, too large for {dtype}. Check scale "
                "and lora_alpha"
            )


def _is_within(values: Tensor, largest: float) -> bool:
    low, high = values.aminmax()
    return -largest <= float(low) and float(high) <= largest


def _mismatch(denoiser: nn.Module, path: str, parts: dict[str, Tensor]) -> str:
    """Say why the parts of a LoRA cannot be added to a module; empty if they can."""
    module: Any = denoiser
    for name in path.split("."):
        if hasattr(module, "base_layer"):
            return "is a part of another LoRA"
        module = module._modules.get(name)
        if module is None:
            return "does not exist in it"
    missing = {"A", "B"} - parts.keys()
    if missing:
        return f"has only one half of a LoRA, lora_{next(iter({'A', 'B'} - missing), 'B')}"
    kernel: tuple[int, ...] = ()
    width = tuple(getattr(module, side, None) for side in ("in_features", "out_features"))
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        width, kernel = (base.in_channels, base.out_channels), base.kernel_size
        if base.groups > 1:
            return "is a convolution in groups, to which no LoRA can be added"
    if None in width or isinstance(base, nn.Bilinear):
        return f"is a {type(base).__name__}, not a linear or convolution layer"
    down, up = tuple(parts["A"].shape), tuple(parts["B"].shape)
    if len(down) != 2 + len(kernel) or len(up) != len(down):
        return f"has weights of shape {list(down)} and {list(up)}, expected {2 + len(kernel)} dimensions"
    if down[0] != up[1]:
        return f"has halves of rank {down[0]} and {up[1]}"
    if down[0] == 0:
        return "has halves of rank 0"
    if (down[1], up[0]) != width:
        return f"has {width[0]} inputs and {width[1]} outputs, the LoRA {down[1]} and {up[0]}"
    if down[2:] != kernel or any(side != 1 for side in up[2:]):
        return f"has the kernel {list(kernel)}, the LoRA {list(down[2:])} and {list(up[2:])}, expected 1 in its second"
    if "bias" in parts and tuple(parts["bias"].shape) != width[1:]:
        return f"has {width[1]} outputs, the bias of the LoRA has the shape {list(parts['bias'].shape)}"
    return ""
