"""Generate videos with a diffusers pipeline, dense or with pyramid sparse attention (PSA).

    python scripts/generate.py --model demo --use_psa --compare          no network, no GPU: a first look
    python scripts/generate.py --model wan21_1.3b --prompt "a cat on a skateboard" --use_psa
    python scripts/generate.py --model cogvideo_5b_lora --prompt "a panda plays the guitar" --use_psa
    python scripts/generate.py --model cogvideo_5b --prompt_file prompts.txt --use_psa --attention_preset psa_balanced
    python scripts/generate.py --model ./my_pipeline --prompt "..." --use_psa --set warmup_steps=5 block_size.m=64
    accelerate launch --multi_gpu --num_processes 2 scripts/generate.py --prompt_file prompts.txt --model wan21_1.3b

Each video is written as .mp4, and beside it a .json with everything needed to repeat the run. The .json is written
last: a prompt whose .json exists and whose video is whole is finished, and a batch that was interrupted goes on where
it stopped. Processes that write to the same folder share the prompts between them, however they were started; each has
a GPU of its own. The exit status is 0 when all is finished, 1 when a video could not be made or written, 2 when the
command itself was wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psa_diffusers.cli.batch import Batch
from psa_diffusers.cli.demo import unknown_words
from psa_diffusers.cli.generation import check_metrics, device_of_process, load_pipeline, resolve_model
from psa_diffusers.cli.opening import finite_number
from psa_diffusers.cli.prompts import check_text, read_prompt_file
from psa_diffusers.presets import LoraSource, ModelEntry, parse_overrides

__all__ = ["main", "parse", "read_prompts"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit status: 0 if every video is finished, 1 after a message about a video that could not be made or
        written, 2 after a message about what was asked for.
    """
    args = parse(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        entry = resolve_model(args.model, args.models_config)
        prompts = read_prompts(args, entry)
        check_text(args.negative_prompt or "", "--negative_prompt")
        overrides = parse_overrides(args.set)
        if args.compare:
            check_metrics()
        device = args.device or device_of_process()
        lora = LoraSource(args.lora_path, args.lora_weight_name) if args.lora_path else None
        print(f"model {args.model} on {device}: loading ...", flush=True)
        pipe = load_pipeline(entry, device=device, lora=lora)
        if entry.source is None:
            _check_words(prompts, pipe.tokenizer, entry.example_prompt)
        batch = Batch(args, entry, pipe, device, overrides, lora or entry.lora)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        batch.warm_up()
        batch.run_all(prompts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options, and refuse those that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to generate")
    what.add_argument(
        "--model", required=True, help="entry of configs/models.yaml, hub id owner/name, or folder of a pipeline"
    )
    what.add_argument(
        "--models_config", type=Path, help="YAML with model entries of your own, laid over the built-in file"
    )
    what.add_argument("--prompt", help="what the video should show (default: the example prompt of the entry)")
    what.add_argument(
        "--prompt_file", type=Path, help="one prompt a line; empty lines and lines that start with # are skipped"
    )
    what.add_argument("--negative_prompt", help="what it should not show")
    what.add_argument("--image", help="first frame, for image-to-video pipelines: path or address")
    what.add_argument("--width", type=int, help="pixels")
    what.add_argument("--height", type=int, help="pixels")
    what.add_argument("--num_frames", type=int, help="frames of the video")
    what.add_argument("--num_inference_steps", type=int, help="denoising steps")
    what.add_argument("--guidance_scale", type=finite_number, help="classifier-free guidance; 1 turns it off")
    what.add_argument(
        "--seed", type=int, default=42, help="seed of the first prompt; the next has seed + 1 (default: 42)"
    )
    what.add_argument(
        "--lora_path",
        help="LoRA in place of the entry's own: file, folder or hub id; one for four steps brings its settings along",
    )
    what.add_argument("--lora_weight_name", help="file in that folder or repository, if it has several")
    how = parser.add_argument_group("attention")
    how.add_argument("--use_psa", action="store_true", help="switch PSA on (without it everything runs dense)")
    how.add_argument(
        "--attention_preset", help="preset of the model's section (default: the one its entry or section names)"
    )
    how.add_argument(
        "--config", type=Path, help="YAML with presets of your own, laid over configs/attention_config.yaml"
    )
    how.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change keys of the preset; repeatable",
    )
    how.add_argument(
        "--compare", action="store_true", help="generate dense as well: side by side in one file, PSNR, SSIM, times"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, default=Path("outputs"), help="folder for the files (default: outputs)")
    run.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU of this process, if there is one)")
    run.add_argument(
        "--no_warmup", action="store_true", help="skip the short untimed first run on a GPU, which compiles kernels"
    )
    run.add_argument("--verbose", action="store_true", help="log what PSA does, and print the report of every video")
    args = parser.parse_args(argv)
    if args.prompt is not None and args.prompt_file is not None:
        parser.error("give --prompt or --prompt_file, not both")
    if not args.use_psa:
        for name in ("compare", "attention_preset", "config", "set"):
            if getattr(args, name):
                parser.error(f"--{name} means something with --use_psa only")
    return args


def read_prompts(args: argparse.Namespace, entry: ModelEntry) -> list[str]:
    """Return the prompt that was given, those of the file, or the example of the model's entry.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If there is no prompt, or it holds what is no text.
    """
    if args.prompt_file is not None:
        return read_prompt_file(args.prompt_file)
    prompt = args.prompt or entry.example_prompt
    if not prompt:
        raise ValueError("this model has no example prompt: pass --prompt")
    return [check_text(prompt, "the prompt")]


def _check_words(prompts: Sequence[str], tokenizer: Any, example: str) -> None:
    """Refuse prompts with words that the demo model was never shown: it would draw something else without a word."""
    for prompt in prompts:
        if unknown := unknown_words(tokenizer, prompt):
            raise ValueError(
                f"the demo model does not know {', '.join(unknown)}, in {prompt!r}; it knows the words of "
                f"docs/developer/miniature.md, as in {example!r}"
            )
