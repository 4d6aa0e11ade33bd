"""LoRA files for the tiny models, in the layout of the published ones, and all that loading one could change."""

import json

import torch
from safetensors.torch import save_file

BLOCKS = {"cogvideox": "transformer_blocks", "wan2.1": "blocks", "wan2.2-a14b": "blocks"}

# what peft keeps in a layer besides weights
_OF_LAYERS = ("r", "lora_alpha", "scaling", "use_rslora", "_active_adapter", "merged_adapters", "_disable_adapters")


def lora_weights(
    name, *, prefix="transformer", rank=4, width=32, halves=("lora_A.weight", "lora_B.weight"), blocks=2, seed=1
):
    """LoRA on the projections of the self-attentions of all blocks, in the layout of the published files.

    Small enough that bf16 and float16 bear it, large enough to matter.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for block in range(blocks):
        for target in ("to_q", "to_k", "to_v", "to_out.0"):
            path = f"{prefix}.{BLOCKS[name]}.{block}.attn1.{target}"
            weights[f"{path}.{halves[0]}"] = torch.randn(rank, width, generator=rng) / rank**0.5
            weights[f"{path}.{halves[1]}"] = torch.randn(width, rank, generator=rng)
    return weights


def lora_file(folder, name, *, metadata=None, **kwargs):
    """Write a LoRA, with the settings of peft in `metadata` by component and name."""
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(lora_weights(name, **kwargs), path, header(metadata))
    return path


def header(metadata):
    """Settings of peft as diffusers writes them into a file; None for none."""
    return None if metadata is None else {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}


def content(tensor):
    """The very bytes of a tensor, with its type and shape."""
    tensor = tensor.detach()
    return tensor.dtype, tuple(tensor.shape), tensor.is_meta or tensor.contiguous().view(torch.uint8).numpy().tobytes()


def everything(pipe):
    """All of a pipeline that loading a LoRA could change: objects by identity, tensors by their bytes."""
    modules = {
        f"{name}.{path}": module
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for path, module in part.named_modules()
    }
    return {
        "class": type(pipe),
        "attributes": {name: id(value) for name, value in vars(pipe).items()},
        "config": dict(pipe.config),
        "fused": set(pipe.fused_loras),
        "modules": {path: (id(module), type(module), module.training) for path, module in modules.items()},
        "of modules": {path: list(vars(module)) for path, module in modules.items()},
        "hooks": {
            path: [list(module._forward_hooks), list(module._forward_pre_hooks), id(vars(module).get("forward"))]
            for path, module in modules.items()
        },
        "processors": {path: id(vars(module).get("processor")) for path, module in modules.items()},
        "layers of peft": {
            path: {name: repr(vars(module)[name]) for name in _OF_LAYERS if name in vars(module)}
            for path, module in modules.items()
        },
        "adapters": {path: list(vars(module).get("peft_config", ())) for path, module in modules.items()},
        "parameters": {
            f"{path}.{name}": (id(parameter), parameter.requires_grad)
            for path, module in modules.items()
            for name, parameter in module.named_parameters(recurse=False)
        },
        "tensors": {
            f"{name}.{key}": content(tensor)
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
            for key, tensor in part.state_dict().items()
        },
        "random numbers": content(torch.random.get_rng_state()),
    }


def assert_same(pipe, before):
    """The pipeline is as `everything` found it."""
    after = everything(pipe)
    assert after.keys() == before.keys()
    for part, value in before.items():
        if after[part] != value:
            raise AssertionError(f"{part} changed: {_difference(value, after[part])}")


def _difference(before, after):
    if not isinstance(before, dict):
        return f"{before!r} became {after!r}"
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    was, now = (str(each.get(changed[0]))[:100] for each in (before, after))
    return f"{changed[:3]} of {len(changed)}: {was} became {now}"
