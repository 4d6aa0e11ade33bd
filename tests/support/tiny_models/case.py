"""A row of a family: how its small pipeline is built, what it is called with, and what then happens in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GRID = (3, 6, 7)
TEXT_TOKENS = 16
TINY_PRESET = {
    "block_size": {"m": 16, "n": 16, "tile_n": 16},
    "mask_ratios": {1: [0, 0.25], 2: [0.25, 0.5], 8: [0.5, 0.75], 0: [0.75, 1]},
    "mask_mode": "topk",
    "use_sim_mask": False,
    "warmup_steps": 0,
}
"""Overrides under which a few hundred tokens are many blocks at many factors, whatever the preset files say."""
DROP = object()
"""Stands for an argument that a pipeline does not take."""


@dataclass(frozen=True)
class Case:
    """One kind of pipeline.

    Attributes:
        family: Name of its family.
        pipeline: Name of its class; diffusers versions without it skip the case.
        since: Version of diffusers in which it took the form of today, if it was another one first.
        build: Makes a fresh one; keyword arguments change its transformer.
        attentions: Regular expression of the paths of its video self-attentions: the family's, written a second time.
        layers: Their number in one forward.
        passes: Forwards of the denoiser in a step with guidance.
        text: Text tokens in the sequence of a self-attention, of any prompt.
        padded: How many tokens more than the prompt has letters come on top; None if the text is not padded.
        context: Other tokens (keyframes, history) that come on top, given height and width in tokens.
        grid: Its token grid for the default inputs.
        ragged: One that no block divides.
        extra: Inputs beyond those that all take, given height, width and frames in pixels.
        translate: Changes of the inputs that all take, given these.
        prepare: Called with the pipeline and the inputs that all take, before a call.
        latent_frames_per_token: Depth of a token.
        frames_per_latent: Frames of a latent but the first.
        token_pixels: Edge of a token.
        several: Whether it takes several prompts at once.
        has_float64: Whether its denoiser runs in float64; some round to float32 or less on the way.
    """

    family: str
    pipeline: str
    build: Callable[..., Any]
    attentions: str
    layers: int = 2
    passes: int = 1
    text: int = 0
    padded: int | None = None
    context: Callable[[int, int], int] = lambda height, width: 0
    grid: tuple[int, int, int] = GRID
    ragged: tuple[int, int, int] = (3, 7, 9)
    extra: Callable[[int, int, int], dict[str, Any]] = lambda height, width, frames: {}
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda asked: {}
    prepare: Callable[[Any, dict[str, Any]], None] = lambda pipe, asked: None
    latent_frames_per_token: int = 1
    frames_per_latent: int = 4
    token_pixels: int = 16
    several: bool = True
    has_float64: bool = True
    since: str = "0"

    def tokens(self, prompt: str = "a cat walks", grid: tuple[int, int, int] | None = None) -> int:
        """Tokens that self-attention reads."""
        frames, height, width = grid or self.grid
        text = self.text + (0 if self.padded is None else min(len(prompt) + self.padded, TEXT_TOKENS))
        return frames * height * width + self.context(height, width) + text

    def inputs(self, **kwargs: Any) -> dict[str, Any]:
        """Arguments of a call that gives latents, as `ask` takes them, or others of the pipeline's own."""
        names = inspect.signature(self.ask).parameters
        asked = self.ask(**{name: value for name, value in kwargs.items() if name in names})
        own = {name: value for name, value in kwargs.items() if name not in names}
        return {name: value for name, value in {**asked, **self.translate(asked), **own}.items() if value is not DROP}

    def ask(
        self,
        *,
        steps: int = 4,
        guidance: float = 3.0,
        grid: tuple[int, int, int] | None = None,
        seed: int = 0,
        prompt: str | list[str] = "a cat walks",
        negative_prompt: str | list[str] = "blurry",
    ) -> dict[str, Any]:
        """Return what all pipelines can be asked for, and what this one needs; `grid` in tokens."""
        frames, height, width = grid or self.grid
        frames = (frames * self.latent_frames_per_token - 1) * self.frames_per_latent + 1
        height, width = height * self.token_pixels, width * self.token_pixels
        asked = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "output_type": "latent",
            "max_sequence_length": TEXT_TOKENS,
            "height": height,
            "width": width,
            "num_frames": frames,
        }
        return asked | self.extra(height, width, frames)

    def run(self, pipe: Any, **kwargs: Any) -> torch.Tensor:
        """Latents of one call; arguments as `inputs` takes them."""
        names = inspect.signature(self.ask).parameters
        self.prepare(pipe, self.ask(**{name: value for name, value in kwargs.items() if name in names}))
        return pipe(**self.inputs(**kwargs)).frames
