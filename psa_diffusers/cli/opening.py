"""Options for a model and its call, and the open pipeline: for commands that compare, record and calibrate."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from psa_diffusers.cli.generation import load_pipeline, resolve_model, text_length
from psa_diffusers.cli.prompts import read_prompt_file

__all__ = ["DEMO_PROMPTS", "PROMPTS", "add_call_options", "finite_number", "open_model", "read_prompts"]

PROMPTS = (
    "A red ball rolls across a green field and comes to rest beside a blue box.",
    "Rain falls on a lake at night while a small boat drifts past a lighthouse.",
    "Two dogs run through high grass towards the camera.",
    "A slow flight over a city of glass towers at sunrise.",
)
DEMO_PROMPTS = (
    "a red circle moves left over a striped gray background",
    "two yellow rings move up over a plain navy background",
    "a blue triangle stands still over a dotted brown background",
    "a green square moves right over a checkered teal background",
)
_SIZES = ("width", "height", "num_frames", "num_inference_steps")
_CALL = (*_SIZES, "guidance_scale", "negative_prompt", "guidance_scale_2", "max_sequence_length")


def add_call_options(parser: argparse._ActionsContainer) -> None:
    """Sizes, steps, guidance, prompts, seed and device; None stands for what the model's entry says."""
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--num_frames", type=int, help="frames (default: the model's)")
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance_scale", type=finite_number, help="classifier-free guidance (default: the model's)")
    parser.add_argument("--prompt_file", type=Path, help="one prompt a line (default: four prompts of our own)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first prompt, the next has one more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def finite_number(text: str) -> float:
    """Read the number of an option; NaN and the infinities are none."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return number


def open_model(model: str, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Load a pipeline, and the arguments of its call but for the prompt.

    Args:
        model: Entry of configs/models.yaml, folder of a pipeline, or hub id. The last two are called at their
            pipeline's own sizes.
        args: What `add_call_options` parsed.
    """
    entry = resolve_model(model)
    pipe = load_pipeline(entry, device=args.device)
    known = {name: getattr(entry, name) for name in _CALL} if entry.name != "custom" else {}
    given = {name: getattr(args, name) for name in (*_SIZES, "guidance_scale")}
    call = known | {name: value for name, value in given.items() if value is not None}
    call |= text_length(pipe)
    return pipe, {name: value for name, value in call.items() if value is not None}


def read_prompts(args: argparse.Namespace, model: str) -> list[str]:
    """The prompts of the file, or our own: the demo models have a language of their own."""
    if args.prompt_file is None:
        return list(DEMO_PROMPTS if resolve_model(model).source is None else PROMPTS)
    return read_prompt_file(args.prompt_file)
