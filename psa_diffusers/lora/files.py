"""Find and read the file of a LoRA: on the disk, in a folder, in a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from psa_diffusers.lora.recipes import DEFAULT_FILE, REPOSITORY, published_models, recipe_for

__all__ = ["read_lora"]


def read_lora(
    pipe: Any, source: str | Path, weight_name: str | None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the weights, with the keys of diffusers where diffusers can convert them, and the metadata of the file.

    Args:
        pipe: The pipeline that the LoRA is for.
        source: A file, a folder, or a repository on the hub.
        weight_name: The file in the folder or repository, if it has several.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or several could be meant.
    """
    from safetensors import SafetensorError

    recipe = recipe_for(pipe)
    known = None if recipe is None else recipe.file
    path = _local_file(source, weight_name, known)
    place, name = source, weight_name
    if path is None and name is None and str(source) == REPOSITORY:
        if known is None:
            raise ValueError(
                f"{REPOSITORY} has no LoRA for this pipeline, only for {published_models()}; pass weight_name for "
                "others"
            )
        name = known
    if path is not None:
        # offline, older diffusers wants the name of the file; with another ending and a name it would unpickle
        place, name = (path.parent, path.name) if path.suffix == ".safetensors" else (path, None)
    try:
        weights, metadata = pipe.lora_state_dict(
            str(place), weight_name=name, use_safetensors=True, return_lora_metadata=True
        )
    except OSError as error:
        raise FileNotFoundError(f"cannot get the LoRA {source!r} ({weight_name or 'any file'}): {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path or source} is not a safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path or source} is not a LoRA that diffusers can read: key {error} is missing") from error
    return weights, metadata


def _local_file(source: str | Path, weight_name: str | None, known: str | None) -> Path | None:
    """Return the file that is meant; None if `source` can only be a repository on the hub.

    Args:
        source: As the user gave it.
        weight_name: As the user gave it.
        known: Where the file stands in a copy of the repository of the published LoRAs.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if weight_name is None and known is not None and (path / known).is_file():
            return path / known
        names = sorted(file.name for file in path.glob("*.safetensors"))
        name = weight_name or (DEFAULT_FILE if DEFAULT_FILE in names else names[0] if len(names) == 1 else None)
        if name is None and names:
            raise ValueError(f"{path} has several files; pass weight_name, one of {', '.join(names)}")
        if name is None or not (path / name).is_file():
            raise FileNotFoundError(
                f"no LoRA file {name or '*.safetensors'} in {path}; it has {', '.join(names) or 'none'}"
            )
        return path / name
    is_repository = (
        isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix != ".safetensors"
    )
    if not is_repository:
        raise FileNotFoundError(
            f"no LoRA file at {path}; give a safetensors file, its folder, or a hub repository owner/name"
        )
    return None
