"""Read the file of a LoRA. It comes from outside: nothing in it is trusted, and nothing in it can run code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.lora.check import is_diffusers_key
from psa_diffusers.lora.metadata import LARGEST, Metadata

__all__ = ["read_file"]

_METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration of peft
_LONGEST_NUMBER = 4  # digits: no denoiser has 10,000 blocks, and converters count up to the number that stands there
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_BYTES = {torch.float8_e4m3fn, torch.float8_e5m2}


def read_file(pipe: Any, path: Path) -> tuple[dict[str, Tensor], Metadata]:
    """Return the weights of a file, with the keys of diffusers where diffusers can convert them, and its metadata.

    Args:
        pipe: The pipeline that the LoRA is for: its class knows the layouts of other programs.
        path: The file. It is read as safetensors, whatever its name.

    Raises:
        ValueError: If it is no safetensors file, or one that is no LoRA.
    """
    weights, header = _read(path)
    metadata = _parse(header.get(_METADATA), path)
    if not all(is_diffusers_key(key) for key in weights):
        _check_convertible(weights, path)
        try:
            weights = dict(pipe.lora_state_dict(weights))
        except Exception as error:  # a converter takes for granted that every key is there and has its shape
            raise ValueError(
                f"{path} is not a LoRA that diffusers can read: {type(error).__name__}: {error}"
            ) from error
    return weights, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # copies: the file may be written again while the LoRA is in use
            weights = {key: _floats(file.get_tensor(key), key, path) for key in file.keys()}
            return weights, dict(file.metadata() or {})
    except (SafetensorError, UnicodeDecodeError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _floats(weight: Tensor, key: str, path: Path) -> Tensor:
    if weight.dtype in _BYTES:
        return weight.float()
    if weight.dtype in _FLOATS or (key.endswith("alpha") and not weight.is_complex()):
        return weight.clone()
    raise ValueError(
        f"{path} is not a LoRA that can be loaded: {key} has the type {weight.dtype}, expected floating point numbers"
    )


def _parse(text: str | None, path: Path) -> Metadata:
    if not text:
        return None
    if len(text) > LARGEST:
        raise ValueError(f"{path}: {_METADATA} has {len(text)} characters, expected at most {LARGEST}")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_METADATA} is not JSON that can be read: {error}") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"{path}: {_METADATA} is a {type(metadata).__name__}, expected the settings of peft by name")
    return metadata


def _check_convertible(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse numbers in a file of another layout that converters count with, or that they scale weights by."""
    for key, weight in weights.items():
        if any(len(number) > _LONGEST_NUMBER for number in re.findall(r"\d+", key)):
            raise ValueError(f"{path} is not a LoRA that diffusers can read: the number in {key!r} is no block's")
        if key.endswith("alpha"):
            value = weight.item() if weight.numel() == 1 else math.nan
            if not 0 <= value < math.inf:
                raise ValueError(f"{path}: {key} is {value:g}, expected one finite number that is not negative")
