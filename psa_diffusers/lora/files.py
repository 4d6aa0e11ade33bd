"""Find the file of a LoRA: on the disk, in a folder, in a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from psa_diffusers.lora.content import read_file
from psa_diffusers.lora.metadata import Metadata
from psa_diffusers.lora.recipes import DEFAULT_FILE, REPOSITORY, published_models, recipes_for

__all__ = ["read_lora"]


def read_lora(pipe: Any, source: str | Path, weight_name: str | None) -> tuple[dict[str, Tensor], Metadata]:
    """Return the weights, with the keys of diffusers where diffusers can convert them, and the metadata of the file.

    Args:
        pipe: The pipeline that the LoRA is for.
        source: A file, a folder, or a repository on the hub.
        weight_name: The file in the folder or repository, if it has several.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or several could be meant.
    """
    known = next((recipe.file for recipe in recipes_for(pipe) if recipe.file is not None), None)
    path = _local_file(source, weight_name, known)
    if path is not None:
        return read_file(pipe, path)
    if weight_name is None and str(source) == REPOSITORY:
        if known is None:
            raise ValueError(
                f"{REPOSITORY} has no LoRA for this pipeline, only for {published_models()}; pass weight_name for "
                "others"
            )
        weight_name = known
    path = _from_hub(str(source), weight_name)
    if path is not None:
        return read_file(pipe, path)
    try:  # diffusers says why not
        weights, metadata = pipe.lora_state_dict(
            str(source), weight_name=weight_name, use_safetensors=True, return_lora_metadata=True
        )
    except OSError as error:
        raise FileNotFoundError(f"cannot get the LoRA {source!r} ({weight_name or 'any file'}): {error}") from error
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


def _from_hub(repository: str, name: str | None) -> Path | None:
    """Return where a file of a repository lies after a download; None if there is none to be had."""
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        names = [name] if name else [file for file in list_repo_files(repository) if file.endswith(".safetensors")]
        if len(names) == 1 or DEFAULT_FILE in names:
            return Path(hf_hub_download(repository, DEFAULT_FILE if DEFAULT_FILE in names else names[0]))
    except Exception:  # no network, no such repository, no access: whoever asks next says which
        return None
    if names:
        raise ValueError(f"{repository} has several files; pass weight_name, one of {', '.join(sorted(names))}")
    return None
