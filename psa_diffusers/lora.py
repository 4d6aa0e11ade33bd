"""Load a LoRA into a video pipeline, checked before anything changes."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["load_psa_lora"]

logger = logging.getLogger("psa_diffusers")

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
# endings of the two halves of a LoRA: the form of peft, and the older one of diffusers
_HALVES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora.down.weight": "A", "lora.up.weight": "B"}
_KEY = re.compile(
    r"(?P<component>transformer|transformer_2)\.(?P<module>.+?)\.(?P<ending>lora(_[AB]|\.down|\.up)\.\w+)"
)


def load_psa_lora(
    pipe: Any,
    source: str | Path,
    *,
    weight_name: str | None = None,
    adapter_name: str = "psa",
    scale: float = 1.0,
    fuse: bool = False,
) -> Any:
    """Load a LoRA from a safetensors file and make it the active adapter.

    Works before and after `enable_psa`, with the same result. The file is checked against the denoiser first: that it
    exists, that its keys are those of a diffusers LoRA, that every target exists and has the right shape.

    The 4-step CogVideoX-5B needs, besides its LoRA, the preset it was trained with and a schedule of four steps:

        from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
        from psa_diffusers import enable_psa, load_psa_lora

        pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", torch_dtype=torch.bfloat16).to("cuda")
        pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        load_psa_lora(pipe, "GYP666/BLADE", weight_name="cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors")
        enable_psa(pipe, "psa_4steps")
        video = pipe("a panda plays the guitar", num_inference_steps=4, guidance_scale=1.0).frames[0]

    Args:
        pipe: A diffusers pipeline that can load LoRAs.
        source: A safetensors file, a folder with one, or a repository on the hub.
        weight_name: The file in the folder or repository, if it has several.
        adapter_name: Name of the adapter, for `pipe.set_adapters` and `pipe.delete_adapters`. Other adapters become
            inactive, as always when diffusers loads one; `pipe.set_adapters([...], [...])` combines several.
        scale: Strength, 1.0 as trained.
        fuse: Whether to merge the LoRA into the weights: faster, undone by `pipe.unfuse_lora()`.

    Returns:
        The pipeline itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no LoRA of this model, or the adapter name is taken.
        TypeError: If the pipeline cannot load LoRAs.
            Whatever is raised, the pipeline has not been changed.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"load_psa_lora needs a pipeline that can load LoRAs, got {type(pipe).__name__}")
    if adapter_name in {name for names in pipe.get_list_adapters().values() for name in names}:
        raise ValueError(
            f"the pipeline has an adapter {adapter_name!r} already; choose another adapter_name, or call "
            f"pipe.delete_adapters({adapter_name!r}) first"
        )
    weights, metadata = _read(pipe, source, weight_name)
    components = _check(pipe, weights, source)

    for component in components:
        getattr(pipe, component).load_lora_adapter(
            weights, prefix=component, adapter_name=adapter_name, metadata=metadata, _pipeline=pipe
        )
    pipe.set_adapters(adapter_name, scale)
    if fuse:
        pipe.fuse_lora(components=components, adapter_names=[adapter_name])
    logger.info("LoRA %s in %s as %r, scale %g", source, " and ".join(components), adapter_name, scale)
    return pipe


def _read(pipe: Any, source: str | Path, weight_name: str | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the weights, with the keys of diffusers where diffusers can convert them, and the metadata of the file."""
    from safetensors import SafetensorError

    path = _local_file(source, weight_name)
    place, name = source, weight_name
    if path is not None:
        # offline, older diffusers wants the name of the file; with another ending and a name it would unpickle
        place, name = (path.parent, path.name) if path.suffix == ".safetensors" else (path, None)
    try:
        return pipe.lora_state_dict(str(place), weight_name=name, use_safetensors=True, return_lora_metadata=True)
    except OSError as error:
        raise FileNotFoundError(f"cannot get the LoRA {source!r} ({weight_name or 'any file'}): {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path or source} is not a safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path or source} is not a LoRA that diffusers can read: key {error} is missing") from error


def _local_file(source: str | Path, weight_name: str | None) -> Path | None:
    """Return the file that is meant; None if `source` can only be a repository on the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
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


def _check(pipe: Any, weights: dict[str, Tensor], source: str | Path) -> list[str]:
    """Return the components that the LoRA belongs to; raise ValueError if it does not fit them."""
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
    for component, module in halves:
        denoiser = getattr(pipe, component, None)
        if denoiser is None:
            raise ValueError(f"{source} has weights for {component}, which this {type(pipe).__name__} does not have")
        problem = _mismatch(denoiser, module, halves[component, module])
        if problem:
            name = type(getattr(denoiser, "_orig_mod", denoiser)).__name__
            raise ValueError(f"{source} is a LoRA of another model than this {name}: {component}.{module} {problem}")
    return list(dict.fromkeys(component for component, _ in halves))


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
