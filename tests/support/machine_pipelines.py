"""The pipelines of the state machine: real denoisers and schedulers, given embeddings, a call in milliseconds."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import yaml
from lora_files import lora_weights
from tiny import ALL_CASES, seeded

from psa_diffusers.pipelines.enable import enable_psa

GRID = (2, 4, 4)
SECTIONS = ("Wan2.1_1.3b", "demo", "LTX-Video", "Wan2.2_A14B")
"""Of `configs/attention_config.yaml`: those of which the small denoisers get their presets."""
LAYERS = 2
NAMES = ("transformer", "transformer_2")
BLOCKS = {"block_size": {"m": 16, "n": 16}, "mask_mode": "topk", "use_sim_mask": False, "use_rearrange": False}
HALF = {**BLOCKS, "mask_ratios": {1: [0, 0.5], 0: [0.5, 1]}}
POOLED = {**BLOCKS, "mask_ratios": {1: [0, 0.5], 2: [0.5, 1]}}


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline.

    Attributes:
        case: Its row in the tiny models.
        sibling: Another class that shares its denoiser, and runs from the same arguments.
        passes: Forwards in a step with guidance.
        boundary: Share of the noise above which the first of two experts runs; None with one denoiser.
    """

    case: str
    sibling: str
    passes: int
    boundary: float | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its denoisers."""
        return NAMES[: 1 if self.boundary is None else 2]

    @property
    def cls(self) -> str:
        """Name of its class."""
        return ALL_CASES[self.case].pipeline

    @property
    def attentions(self) -> str:
        """Regular expression of the paths of its video self-attentions."""
        return ALL_CASES[self.case].attentions

    def denoiser(self, seed: int) -> torch.nn.Module:
        """A new denoiser whose weights depend on the seed alone."""
        return copy.deepcopy(_denoiser(self, seed))

    def pipeline(self, denoisers: Mapping[str, torch.nn.Module], cls: str | None = None) -> Any:
        """A new pipeline around denoisers by name, of its class or of another."""
        components = {**_components(self), **denoisers}
        components["scheduler"] = copy.deepcopy(components["scheduler"])
        made_of = getattr(diffusers, cls or self.cls)
        names = inspect.signature(made_of).parameters
        pipe = made_of(**{name: part for name, part in components.items() if name in names})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, steps: int, guided: bool, **kwargs: Any) -> torch.Tensor:
        """Latents of one call."""
        arguments = {**_inputs(self), "num_inference_steps": steps, "guidance_scale": 3.0 if guided else 1.0}
        if "VideoToVideo" in type(pipe).__name__:
            arguments = {k: v for k, v in arguments.items() if k != "num_frames"} | {"strength": 1.0}
        if "VideoToVideo" in type(pipe).__name__ and self.case == "cogvideox":
            arguments.pop("max_sequence_length")
        arguments["latents"] = arguments["latents"].clone()
        return pipe(**arguments, **kwargs).frames

    def forward(self, denoiser: torch.nn.Module, timestep: float) -> torch.Tensor:
        """One forward of a denoiser alone."""
        inputs = _forward_inputs(self)
        return denoiser(**{**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)})[0]

    def lora(self) -> dict[str, torch.Tensor]:
        """Weights of an adapter for its first denoiser."""
        return lora_weights("wan2.1" if self.case.startswith("wan") else "cogvideox", rank=2)


KINDS = (
    Kind("wan2.1", "WanVideoToVideoPipeline", passes=2),
    Kind("cogvideox", "CogVideoXVideoToVideoPipeline", passes=1),
    Kind("ltx", "LTXImageToVideoPipeline", passes=1),
    Kind("wan2.2-a14b", "WanPipeline", passes=2, boundary=0.875),
)


@dataclass(frozen=True)
class Choice:
    """What a pipeline is enabled with, and what that means, told without our help.

    Attributes:
        arguments: For `enable_psa` or `PSAProcessor`.
        warmup: Dense steps at the start.
        follows: Whether that is a share of 50 steps where it would leave no sparse step.
        last: Dense steps at the end.
        dense_layers: Layers that are always dense.
        refresh: Steps that a level map serves.
        is_dense: Whether all is dense.
    """

    name: str
    arguments: Mapping[str, Any] = field(compare=False)
    warmup: int = 0
    follows: bool = False
    last: int = 0
    dense_layers: tuple[int, ...] = ()
    refresh: int = 1
    is_dense: bool = False

    @property
    def report(self) -> bool:
        return bool(self.arguments.get("report"))

    def is_sparse(self, layer: int, step: int, num_steps: int | None) -> bool:
        """Whether a layer is sparse in a step; of a denoiser that runs alone the number of steps is not known."""
        warmup = self.warmup
        if self.follows and num_steps is not None and warmup >= num_steps:
            warmup = -(-num_steps * self.warmup // 50)
        is_last = num_steps is not None and step >= num_steps - self.last
        return not (self.is_dense or layer in self.dense_layers or step < warmup or is_last)


def choices(config: str) -> tuple[Choice, ...]:
    """What the machine enables. `config` is a file that `write_config` has written."""
    return (
        Choice("plain", {**HALF, "warmup_steps": 0}),
        Choice("warm", {**POOLED, "warmup_steps": 2, "report": True}, warmup=2),
        Choice("ends", {**HALF, "warmup_steps": 1, "dense_last_steps": 1}, warmup=1, last=1),
        Choice("layer", {**POOLED, "warmup_steps": 0, "dense_layers": "0", "report": True}, dense_layers=(0,)),
        Choice("kept", {**HALF, "warmup_steps": 1, "refresh_every": 2, "report": True}, warmup=1, refresh=2),
        Choice("named", {"preset": "machine", "config": config, "report": True}, warmup=25, follows=True),
        Choice("dense", {"type": "dense", "report": True}, is_dense=True),
    )


def write_config(path: Any) -> str:
    """Write the presets of the choice `named`; return the path."""
    preset = {**POOLED, "type": "psa", "warmup_steps": 25}
    path.write_text(yaml.safe_dump({name: {"attention_configs": {"machine": preset}} for name in SECTIONS}))
    return str(path)


WRONG: tuple[Mapping[str, Any], ...] = (
    {"preset": "no_such_preset"},
    {"mask_ratios": {1: [0, 0.4]}},
    {"warmup_steps": -1},
    {"preset": 7},
)


@functools.cache
def reference(
    kind: Kind, cls: str, weights: tuple[tuple[int, bool], ...], choice: Choice | None, steps: int, guided: bool
) -> torch.Tensor:
    """Latents of a pipeline that nothing else has happened to.

    Args:
        kind: Its kind.
        cls: Name of its class.
        weights: Of each denoiser, the seed, and whether it has an adapter.
        choice: What PSA is enabled with, if at all.
        steps: Denoising steps.
        guided: Whether with guidance.
    """
    denoisers = {name: kind.denoiser(seed) for name, (seed, _) in zip(kind.parts, weights, strict=True)}
    for denoiser, (_, has_adapter) in zip(denoisers.values(), weights, strict=True):
        if has_adapter:
            add_adapter(kind, denoiser)
    pipe = kind.pipeline(denoisers, cls)
    if choice is not None:
        enable_psa(pipe, **choice.arguments)
    return kind.run(pipe, steps, guided)


def add_adapter(kind: Kind, denoiser: Any) -> None:
    """Load an adapter as `pipe.load_lora_weights` does."""
    denoiser.load_lora_adapter(kind.lora(), prefix="transformer", adapter_name="machine")


# what costs time is made once


@functools.cache
def _denoiser(kind: Kind, seed: int) -> torch.nn.Module:
    first = _assembled(kind)[0].transformer
    return seeded(type(first).from_config, first.config, seed=seed)


@functools.cache
def _assembled(kind: Kind) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pipeline with its text encoder, the inputs of a call without it, and those of a forward."""
    case = ALL_CASES[kind.case]
    pipe = case.build()
    asked = case.inputs(grid=GRID, steps=1, guidance=1.0)
    forwards: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(kwargs), with_kwargs=True)
    asked["latents"] = pipe(**asked).frames
    hook.remove()
    embeds = pipe.encode_prompt(asked.pop("prompt"), asked.pop("negative_prompt"), max_sequence_length=16)
    names = ("prompt_embeds", "negative_prompt_embeds")
    if len(embeds) == 4:
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    if embeds[names.index("negative_prompt_embeds")] is None:
        raise AssertionError(f"{kind.case} gives no embeddings of the negative prompt")
    del asked["generator"]
    return pipe, {**asked, **dict(zip(names, embeds, strict=True))}, forwards[0]


def _components(kind: Kind) -> dict[str, Any]:
    pipe = _assembled(kind)[0]
    without = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    config = {"boundary_ratio": kind.boundary} if kind.boundary is not None else {}
    return {**pipe.components, **without, **config}


def _inputs(kind: Kind) -> dict[str, Any]:
    return _assembled(kind)[1]


def _forward_inputs(kind: Kind) -> dict[str, Any]:
    return _assembled(kind)[2]
