"""The demo models: a small trained CogVideoX with its LoRA for four steps, and a small trained Wan, for first steps.

Their card is weights/README.md; what they know, and how they were trained, is in docs/developer/miniature.md.
Nothing is read before a pipeline is asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import CogVideoXPipeline, WanPipeline
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "FAMILIES",
    "WEIGHTS",
    "build_demo_pipeline",
    "check_hashes",
    "demo_lora",
    "unknown_words",
    "write_hashes",
]

WEIGHTS = Path(__file__).parents[1] / "weights"
"""Where the trained weights stand: one folder a family as `save_pretrained` writes it, and the LoRA for four steps."""

FAMILIES = {"cogvideox": "CogVideoXPipeline", "wan": "WanPipeline"}
"""The demo models and their pipeline classes."""

HASHES = "hashes.json"


def build_demo_pipeline(
    folder: str | Path | None = None, *, family: str = "cogvideox"
) -> CogVideoXPipeline | WanPipeline:
    """Load a demo pipeline. Nothing is fetched.

    Args:
        folder: Folder of a saved pipeline. None takes that of the family in `WEIGHTS`.
        family: `cogvideox` or `wan`.

    Returns:
        The pipeline, float32, on the CPU. A token covers 8 x 8 pixels and 4 frames: 49 x 128 x 128, for which the
        models were trained, make 13 x 16 x 16 = 3,328 video tokens.

    Raises:
        FileNotFoundError: If the folder holds no pipeline, or a file is missing.
        ValueError: If there is no such family, or a file is not the one that was saved.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    place = WEIGHTS / family if folder is None else Path(folder)
    if not (place / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline in {place}: expected a folder that save_pretrained wrote, with model_index.json"
        )
    check_hashes(place)
    import diffusers

    # the new name is ignored before 0.41, the old one warned about since
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    dtype = {"dtype" if version >= (0, 41) else "torch_dtype": torch.float32}
    return diffusers.DiffusionPipeline.from_pretrained(place, local_files_only=True, use_safetensors=True, **dtype)


def unknown_words(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[str]:
    """Words of a prompt that a demo model was not trained with, in their order, each once.

    Args:
        tokenizer: That of the model: a word that was trained is a token.
        prompt: What the user wrote.
    """
    words = re.findall(r"\w+|[^\w\s]+", prompt.lower())
    known = tokenizer.get_vocab()
    return [word for word in dict.fromkeys(words) if word not in known]


def demo_lora(name: str = "psa") -> Path:
    """Return the file of the demo model's LoRA for four steps, checked.

    Args:
        name: `psa`, trained with pyramid sparse attention, or `dense`, the control.

    Raises:
        FileNotFoundError: If the installation has none.
        ValueError: If the file is not the one that was saved.
    """
    folder = WEIGHTS / "cogvideox_lora" / name
    file = folder / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA in {folder}: expected {file.name}")
    check_hashes(folder)
    return file


def write_hashes(folder: str | Path) -> None:
    """Write the SHA-256 of every file below a folder into its `hashes.json`."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / HASHES)
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    (folder / HASHES).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def check_hashes(folder: str | Path) -> None:
    """Compare the files below a folder with its `hashes.json`. A folder without one is not checked.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file has other contents.
    """
    folder = Path(folder)
    if not (folder / HASHES).is_file():
        return
    for name, expected in json.loads((folder / HASHES).read_text(encoding="utf-8")).items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {HASHES} names it: install the package again")
        if (got := _digest(path)) != expected:
            raise ValueError(
                f"{path} is damaged or was changed: expected SHA-256 {expected[:12]}..., got {got[:12]}... Install the "
                f"package again; if the change is meant, write_hashes({str(folder)!r}) accepts it"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
