"""The settings of peft that stand in a LoRA's file: those that count are checked, and nothing else is passed on.

The weights decide which modules change, and at which rank; the settings only add the strength. So an expression for
modules is never matched, a rank never allocates, and a layer is never initialised from the weights of the model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["LARGEST", "Metadata", "adapter_settings", "check_components", "scaling_of"]

Metadata: TypeAlias = dict[str, Any] | None
"""Settings of peft by component and name, `transformer.lora_alpha`; None where a file has none."""

LARGEST = 2**20
"""Characters that they may have: the names of all modules of the largest models are a tenth of that."""

# what decides how the weights are used
_USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}

# what was of use in training, or says again what the weights say
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}

# beginnings of training that leave the weights of the model as they are
_PLAIN = (True, False, None, "gaussian", "orthogonal", "eva")


def adapter_settings(
    ranks: Mapping[str, int], metadata: Metadata, component: str, source: str | Path
) -> dict[str, Any]:
    """Return the settings of peft for one part of a pipeline. Every module stands in them by its name.

    Args:
        ranks: Rank by module path, as the weights have it.
        metadata: The settings in the file, by component and name.
        component: The part of the pipeline.
        source: The file, for messages.

    Raises:
        ValueError: If a setting is of a kind that a plain LoRA does not have, does not fit the weights, or is not
            finite.
    """
    prefix = f"{component}."
    given = {key.removeprefix(prefix): value for key, value in (metadata or {}).items() if key.startswith(prefix)}
    where = f"{source}: {component}"
    _check_plain(given, where)
    use_rslora = given.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise ValueError(f"{where}.use_rslora is {use_rslora!r}, expected true or false")

    for module, rank in _by_module(ranks, given, "rank_pattern", given.get("r"), where).items():
        if rank is not None and (isinstance(rank, bool) or rank != ranks[module]):
            raise ValueError(
                f"{where}.r or rank_pattern says rank {_short(rank)} for {module}, but its weights have rank "
                f"{ranks[module]}"
            )
    alphas: dict[str, float]
    if given:
        alphas = _by_module(ranks, given, "alpha_pattern", given.get("lora_alpha", 8), where)  # 8: peft's own default
    else:
        alphas = dict(ranks)
    for module, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e38:
            raise ValueError(
                f"{where}.lora_alpha or alpha_pattern is {_short(alpha)} for {module}, expected a finite number"
            )
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        # as diffusers writes it: the sign makes peft compare the whole name
        "rank_pattern": {f"^{module}": each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {f"^{module}": each for module, each in alphas.items() if each != alpha},
        "target_modules": list(ranks),
        "use_rslora": use_rslora,
    }


def scaling_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what peft multiplies the change of a module by."""
    alpha: float = settings["alpha_pattern"].get(f"^{module}", settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def check_components(metadata: Metadata, components: Iterable[str], source: str | Path) -> None:
    """Refuse settings that belong to no part of the pipeline.

    Raises:
        ValueError: If there are some.
    """
    prefixes = tuple(f"{component}." for component in components)
    for key in metadata or {}:
        if not key.startswith(prefixes):
            raise ValueError(
                f"{source}: the setting {key!r} in its metadata is for no part of this pipeline, expected names like "
                f"'{prefixes[0]}lora_alpha'"
            )


def _check_plain(given: Mapping[str, Any], where: str) -> None:
    for key, value in given.items():
        if key == "init_lora_weights":
            if not any(value is plain or (isinstance(value, str) and value == plain) for plain in _PLAIN):
                raise ValueError(
                    f"{where}.init_lora_weights is {_short(value)}: such a LoRA belongs to changed weights of the "
                    "model, and loading it must not change yours. Convert it to a plain LoRA (save_pretrained of peft "
                    "with path_initial_model_for_weight_conversion)"
                )
        elif key == "peft_type":
            if value not in (None, "LORA"):
                raise ValueError(f"{where}.peft_type is {_short(value)}, expected 'LORA'")
        elif key not in _USED and key not in _IGNORED and value:
            raise ValueError(
                f"{where}.{key[:80]} is {_short(value)}: only plain LoRAs are loaded, without this setting. Save the "
                "LoRA without it, or merge it into the model with the program that trained it"
            )


def _by_module(
    modules: Iterable[str], given: Mapping[str, Any], name: str, otherwise: Any, where: str
) -> dict[str, Any]:
    """Return the value of each module by a pattern of peft: names, or ends of names. The first that fits counts."""
    pattern = given.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{where}.{name} is {_short(pattern)}, expected values by name of a module")
    names: dict[tuple[str, bool], Any] = {}
    for key, value in pattern.items():
        plain = key.removeprefix("^").removesuffix("$").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise ValueError(
                f"{where}.{name} has the expression {_short(key)}, expected names of modules: write one entry a module"
            )
        names.setdefault((plain, key.startswith("^")), value)
    values = {}
    for module in modules:
        parts = module.split(".")
        ends = {".".join(parts[start:]) for start in range(len(parts))}
        fitting = (value for (plain, whole), value in names.items() if plain == module or (not whole and plain in ends))
        values[module] = next(fitting, otherwise)
    return values


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
