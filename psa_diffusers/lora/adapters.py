"""The adapters of peft in the denoisers of a pipeline: which there are, and how they get out of the weights again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from psa_diffusers.pipelines.host import unwrap

__all__ = [
    "active_adapters",
    "adapters_of",
    "delete_adapter",
    "fuse_adapters",
    "fused_adapters",
    "loadable_parts",
    "take_out_of_weights",
]


def loadable_parts(pipe: Any) -> dict[str, Any]:
    """Return the parts of a pipeline that LoRAs go into, by name, compiled ones unwrapped."""
    parts = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {
        name: unwrap(part) for name, part in parts.items() if part is not None and hasattr(part, "load_lora_adapter")
    }


def adapters_of(denoiser: Any) -> list[str]:
    """Return the names of the adapters that a denoiser has."""
    return list(getattr(denoiser, "peft_config", None) or ())


def active_adapters(denoiser: nn.Module) -> list[str]:
    """Return the names of the adapters that take part."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)), None)
    return [] if layer is None else list(layer.active_adapters)


def fused_adapters(denoiser: nn.Module) -> list[str]:
    """Return the names of the adapters that are merged into the weights."""
    return list({name: None for part in denoiser.modules() for name in getattr(part, "merged_adapters", ())})


def delete_adapter(denoiser: Any, adapter_name: str, active: Sequence[str]) -> None:
    """Delete an adapter, if it is there, and make others active; the last one takes the layers of peft with it."""
    if adapter_name not in adapters_of(denoiser):
        return
    others = [name for name in adapters_of(denoiser) if name != adapter_name]
    if not others:
        denoiser.unload_lora()
        return
    denoiser.set_adapter(list(active) or others[:1])
    denoiser.delete_adapters(adapter_name)


def fuse_adapters(pipe: Any, component: str, adapter_names: Sequence[str]) -> None:
    """Merge adapters into the weights of one part of a pipeline."""
    denoiser: Any = unwrap(getattr(pipe, component))
    if denoiser is getattr(pipe, component):
        pipe.fuse_lora(components=[component], adapter_names=list(adapter_names))
    else:  # the pipeline passes over a compiled denoiser
        denoiser.fuse_lora(adapter_names=list(adapter_names))


def take_out_of_weights(
    pipe: Any, adapter_names: Sequence[str], *, only: str | None = None, for_now: bool = False
) -> None:
    """Undo the fusing of some adapters. What else is fused stays, unless the caller fuses again himself.

    Args:
        pipe: The pipeline.
        adapter_names: Adapters to take out; those that are not fused do not matter.
        only: The one part of the pipeline to look at; None looks at all.
        for_now: Whether the caller fuses again what else was fused.
    """
    for component, denoiser in loadable_parts(pipe).items():
        fused = fused_adapters(denoiser)
        if only not in (None, component) or not set(fused) & set(adapter_names):
            continue
        if getattr(pipe, component) is denoiser:
            pipe.unfuse_lora(components=[component])
        else:
            denoiser.unfuse_lora()
        others = [name for name in fused if name not in adapter_names]
        if others and not for_now:
            fuse_adapters(pipe, component, others)
