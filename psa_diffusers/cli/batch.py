"""The prompts of one command: one pipeline, one set of settings, and the files of every prompt."""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from psa_diffusers.cli.generation import (
    Generated,
    call_defaults,
    compare_videos,
    environment,
    generate,
    plain_config,
    preset_for,
    revision,
)
from psa_diffusers.cli.outputs import clear_parts, digest, is_whole, output_name, write_json, write_video
from psa_diffusers.cli.worklist import share_out
from psa_diffusers.lora import Recipe, recipe_of
from psa_diffusers.presets import LoraSource, ModelEntry

__all__ = ["Batch", "call_arguments"]


def call_arguments(args: argparse.Namespace, entry: ModelEntry, pipe: Any, recipe: Recipe | None) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, but for the prompt.

    They are the entry's, overruled by those that a few-step LoRA needs and by the command line. An unknown model has
    its own defaults.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    names = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt")
    more = ("guidance_scale_2", "max_sequence_length")
    known = {} if entry.name == "custom" else {name: getattr(entry, name) for name in (*names, *more)}
    given = {name: getattr(args, name) for name in names}
    chosen = {**call_defaults(pipe, names), **known, **(recipe.call if recipe else {})}
    chosen |= {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
    return {name: value for name, value in chosen.items() if value is not None}


class Batch:
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
        self._looked_at: dict[str, tuple[object, bool]] = {}
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
        taken = inspect.signature(type(pipe).__call__).parameters
        if args.image and "image" not in taken:
            raise ValueError(f"--image: {type(pipe).__name__} takes no image; choose a model of image-to-video")
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
        for name, is_done in zip(names, done, strict=True):
            video, record = self.files(name)
            if is_done:
                print(f"{video}: finished already")
            elif record.exists():
                print(f"{video}: missing, cut off or damaged, though {record.name} says finished: it is made again")
        with (
            tqdm(total=len(names), initial=sum(done), desc="prompts", disable=len(prompts) == 1) as bar,
            closing(share_out(names, self.args.output_dir, self.is_finished)) as work,
        ):
            for index in work:
                self.run_one(names[index], prompts[index], seeds[index])
                bar.n = sum(map(self.is_finished, names))
                bar.refresh()
        clear_parts(self.args.output_dir, names)

    def files(self, name: str) -> tuple[Path, Path]:
        """Return where the video of that name and its record stand."""
        return self.args.output_dir / f"{name}.mp4", self.args.output_dir / f"{name}.json"

    def is_finished(self, name: str) -> bool:
        """Whether both files are there and the video is whole; looked at again when they change."""
        files = self.files(name)
        try:
            marks = [(mark.st_ino, mark.st_size, mark.st_mtime_ns) for mark in (path.stat() for path in files)]
        except OSError:
            return False
        if self._looked_at.get(name, (None,))[0] != marks:
            self._looked_at[name] = marks, is_whole(*files)
        return self._looked_at[name][1]

    def run_one(self, name: str, prompt: str, seed: int) -> None:
        """Generate the video of one prompt, and the dense one to compare with; write video and record."""
        video, record = self.files(name)
        clear_parts(self.args.output_dir, [name])  # of a process that was killed: this one has the claim now
        for stump in (record, video):
            stump.unlink(missing_ok=True)  # should this run fail as well, no final name promises anything
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
                "video_sha256": digest(video),
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
