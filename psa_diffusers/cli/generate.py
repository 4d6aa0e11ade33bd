"""Generate videos with a diffusers pipeline, dense or with pyramid sparse attention (PSA).

    python scripts/generate.py --model demo --use_psa --compare          no network, no GPU: a first look
    python scripts/generate.py --model wan21_1.3b --prompt "a cat on a skateboard" --use_psa
    python scripts/generate.py --model cogvideo_5b_lora --prompt "a panda plays the guitar" --use_psa
    python scripts/generate.py --model cogvideo_5b --prompt_file prompts.txt --use_psa --attention_preset psa_balanced
    python scripts/generate.py --model ./my_pipeline --prompt "..." --use_psa --set warmup_steps=5 block_size.m=64
    accelerate launch --multi_gpu --num_processes 2 scripts/generate.py --prompt_file prompts.txt --model wan21_1.3b

Each video is written as .mp4, and beside it a .json with everything needed to repeat the run. The .json is written
last: a prompt whose .json exists is finished, and a batch that was interrupted goes on where it stopped. Processes that
write to the same folder share the prompts between them, however they were started; each has a GPU of its own.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from psa_diffusers.cli.demo import unknown_words
from psa_diffusers.cli.generation import (
    Generated,
    call_defaults,
    check_metrics,
    compare_videos,
    device_of_process,
    environment,
    generate,
    load_pipeline,
    output_name,
    plain_config,
    preset_for,
    resolve_model,
    revision,
    write_json,
    write_video,
)
from psa_diffusers.cli.worklist import share_out
from psa_diffusers.lora import Recipe, recipe_of
from psa_diffusers.presets import LoraSource, ModelEntry, parse_overrides

__all__ = ["call_arguments", "main", "parse", "read_prompts"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 after a message about what was asked for.
    """
    args = parse(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        entry = resolve_model(args.model, args.models_config)
        prompts = read_prompts(args, entry)
        overrides = parse_overrides(args.set)
        if args.compare:
            check_metrics()
        device = args.device or device_of_process()
        lora = LoraSource(args.lora_path, args.lora_weight_name) if args.lora_path else None
        print(f"model {args.model} on {device}: loading ...", flush=True)
        pipe = load_pipeline(entry, device=device, lora=lora)
        if entry.source is None:
            _check_words(prompts, pipe.tokenizer, entry.example_prompt)
        batch = _Batch(args, entry, pipe, device, overrides, lora or entry.lora)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output_dir.mkdir(parents=True, exist_ok=True)
    batch.warm_up()
    batch.run_all(prompts)
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
    what.add_argument("--guidance_scale", type=float, help="classifier-free guidance; 1 turns it off")
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
        ValueError: If there is no prompt.
    """
    if args.prompt_file is not None:
        if not args.prompt_file.is_file():
            raise FileNotFoundError(f"no prompt file at {args.prompt_file}")
        lines = (line.strip() for line in args.prompt_file.read_text(encoding="utf-8").splitlines())
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise ValueError(f"{args.prompt_file} holds no prompt: write one a line")
        return prompts
    prompt = args.prompt or entry.example_prompt
    if not prompt:
        raise ValueError("this model has no example prompt: pass --prompt")
    return [prompt]


def call_arguments(args: argparse.Namespace, entry: ModelEntry, pipe: Any, recipe: Recipe | None) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, but for the prompt.

    They are the entry's, overruled by those that a few-step LoRA needs and by the command line. An unknown model has
    its own defaults.
    """
    names = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt")
    more = ("guidance_scale_2", "max_sequence_length")
    known = {} if entry.name == "custom" else {name: getattr(entry, name) for name in (*names, *more)}
    given = {name: getattr(args, name) for name in names}
    chosen = {**call_defaults(pipe, names), **known, **(recipe.call if recipe else {})}
    chosen |= {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in chosen.items() if value is not None}


def _check_words(prompts: Sequence[str], tokenizer: Any, example: str) -> None:
    """Refuse prompts with words that the demo model was never shown: it would draw something else without a word."""
    for prompt in prompts:
        if unknown := unknown_words(tokenizer, prompt):
            raise ValueError(
                f"the demo model does not know {', '.join(unknown)}, in {prompt!r}; it knows the words of "
                f"docs/developer/miniature.md, as in {example!r}"
            )


class _Batch:
    """The prompts of one command: one pipeline, one set of settings."""

    def __init__(
        self,
        args: argparse.Namespace,
        entry: ModelEntry,
        pipe: Any,
        device: str,
        overrides: Mapping[str, Any],
        lora: LoraSource | None,
    ) -> None:
        self.args, self.entry, self.pipe, self.device = args, entry, pipe, device
        recipe = recipe_of(pipe)
        self.call = call_arguments(args, entry, pipe, recipe)
        preset, section = args.attention_preset, entry.attention_model
        if preset is None:
            section, preset = recipe.preset if recipe else (section, entry.attention_preset)
        self.psa: dict[str, Any] = {
            "preset": preset,
            "section": section,
            "config": args.config,
            "overrides": overrides,
        }
        # all that decides what the video looks like: it is written down, and names the files
        self.settings = {
            "model": args.model,
            "source": entry.source,
            "revision": revision(pipe),
            "pipeline": type(pipe).__name__,
            "scheduler": {"class_name": type(pipe.scheduler).__name__, **plain_config(pipe.scheduler)},
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "call": self.call,
            "image": args.image,
            "lora": None if lora is None else vars(lora),
            "use_psa": args.use_psa,
            "compare": args.compare,
            "preset": preset_for(pipe, **self.psa).to_dict() if args.use_psa else None,
        }
        if args.image:
            from diffusers.utils import load_image

            self.call = {**self.call, "image": load_image(args.image)}

    def warm_up(self) -> None:
        """On a GPU the first sparse step compiles kernels: let a run of few steps pay for that."""
        if self.device == "cpu" or self.args.no_warmup:
            return
        print("untimed first run (--no_warmup skips it) ...", flush=True)
        call = {**self.call, "prompt": "warm-up", "num_inference_steps": 2}
        overrides = {**self.psa["overrides"], "warmup_steps": 1}
        generate(self.pipe, call, seed=0, use_psa=self.args.use_psa, **{**self.psa, "overrides": overrides})

    def run_all(self, prompts: Sequence[str]) -> None:
        """Do those prompts that are not finished and that no other process has claimed."""
        seeds = [self.args.seed + index for index in range(len(prompts))]
        names = [
            output_name(index, prompt, seed, self.settings)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        done = [self.is_finished(name) for name in names]
        for name in (name for name, is_done in zip(names, done, strict=True) if is_done):
            print(f"{self.files(name)[0]}: finished already")
        with (
            tqdm(total=len(names), initial=sum(done), desc="prompts", disable=len(prompts) == 1) as bar,
            closing(share_out(names, self.args.output_dir, self.is_finished)) as work,
        ):
            for index in work:
                self.run_one(names[index], prompts[index], seeds[index])
                bar.n = sum(map(self.is_finished, names))
                bar.refresh()

    def files(self, name: str) -> tuple[Path, Path]:
        """Return where the video of that name and its record stand."""
        return self.args.output_dir / f"{name}.mp4", self.args.output_dir / f"{name}.json"

    def is_finished(self, name: str) -> bool:
        """Whether both files are there."""
        return all(path.is_file() for path in self.files(name))

    def run_one(self, name: str, prompt: str, seed: int) -> None:
        """Generate the video of one prompt, and the dense one to compare with; write video and record."""
        video, record = self.files(name)
        for half in self.args.output_dir.glob(f".{name}.*part*"):
            half.unlink()  # of a process that was killed: this one has the claim now
        call = {**self.call, "prompt": prompt}
        print(f"prompt: {prompt}", flush=True)
        dense = None
        if self.args.compare:
            print("dense attention:", flush=True)
            dense = generate(self.pipe, call, seed=seed)
        print("pyramid sparse attention:" if self.args.use_psa else "dense attention:", flush=True)
        made = generate(self.pipe, call, seed=seed, use_psa=self.args.use_psa, **self.psa)
        result = self.compare(made, dense)
        frames = made.frames if dense is None else np.concatenate([dense.frames, made.frames], axis=2)
        write_video(video, frames, self.entry.fps)
        write_json(
            record,
            {
                "command": ["scripts/generate.py", *sys.argv[1:]],
                "prompt": prompt,
                "seed": seed,
                "video": video.name,
                "frames": list(made.frames.shape),
                "fps": self.entry.fps,
                **self.settings,
                "entry": self.entry.to_dict(),
                "report": made.report,
                "result": result,
                "environment": environment(self.device),
            },
        )
        self.tell(video, made, result)

    def compare(self, made: Generated, dense: Generated | None) -> dict[str, Any]:
        """Return the figures of a video for its record, with those against the dense one if there is one."""
        result: dict[str, Any] = {"seconds": made.seconds, "denoising_seconds": made.denoising_seconds}
        if self.args.use_psa:
            result |= {"density": made.density, "sparse_density": made.sparse_density}
        if dense is not None:
            result |= {"dense_seconds": dense.seconds, "dense_denoising_seconds": dense.denoising_seconds}
            result |= {"speedup": dense.seconds / made.seconds, **compare_videos(made.frames, dense.frames)}
            if made.denoising_seconds and dense.denoising_seconds:
                result["denoising_speedup"] = dense.denoising_seconds / made.denoising_seconds
        return result

    def tell(self, video: Path, made: Generated, result: Mapping[str, Any]) -> None:
        """Print what there is to say about a video."""
        if self.args.verbose and made.report:
            print(made.report)
        if "speedup" in result:
            line = f"dense {result['dense_seconds']:.1f} s, PSA {made.seconds:.1f} s: {result['speedup']:.2f}x as fast"
            if "denoising_speedup" in result:
                line += f" ({result['denoising_speedup']:.2f}x in the denoising steps)"
            print(line + f"; PSNR {result['psnr']:.1f} dB, SSIM {result['ssim']:.3f} against dense")
            print("left: dense, right: PSA")
        if made.sparse_density is not None:
            print(
                f"density {made.sparse_density:.3f} in the sparse steps, {made.density:.3f} over all steps (dense = 1)"
            )
        elif made.report:
            print("nothing ran sparse:\n" + made.report)
        print(f"{made.seconds:.1f} s  {video}", flush=True)
