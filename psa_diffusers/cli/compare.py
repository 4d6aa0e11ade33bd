"""Videos of several presets against dense attention, same seed: density, PSNR and SSIM (LPIPS on request), as a table.

    python scripts/compare.py                                          the demo model, four prompts, about 20 minutes
    python scripts/compare.py --model cogvideo_5b --prompt_file prompts.txt --json compare.jsonl
    python scripts/compare.py --presets published@0.1 psa_cover my_preset --config my_presets.yaml
    python scripts/compare.py --model FOLDER --warmup_steps 1 --num_inference_steps 8

``published`` is the choice of levels published with PSA for CogVideoX: shares .10/.05/.20 at factors 1, 2, 8, the rest
skipped, blocks of 128 in Gilbert order, largest sampled score; ``published@0.07`` the same with shares scaled to that
density. All presets get the same warm-up steps.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from psa_diffusers.cli.generation import compare_videos, generate
from psa_diffusers.cli.opening import add_call_options, open_model, read_prompts
from psa_diffusers.cli.outputs import strict_json, write_text
from psa_diffusers.cli.published import published_choice
from psa_diffusers.models.registry import family_of
from psa_diffusers.presets import PSAPreset, load_preset

__all__ = ["choose_presets", "load_lpips", "main", "parse"]

PRESETS = ("published", "psa_cover", "published@0.07", "psa_fast", "published@0.19", "psa_quality")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: If something that was asked for is not installed, or a preset never ran sparse.
    """
    args = parse(argv)
    lpips = load_lpips() if args.lpips else None
    pipe, call = open_model(args.model, args)
    presets = choose_presets(args, family_of(pipe.transformer).section_of(pipe.transformer, pipe)[0])
    prompts = read_prompts(args, args.model)
    lines = []
    with tqdm(total=len(prompts) * (1 + len(presets)), unit="video", disable=None) as bar:
        for number, prompt in enumerate(prompts):
            inputs, seed = {**call, "prompt": prompt}, args.seed + number
            dense = generate(pipe, inputs, seed=seed)
            bar.update()
            for preset in presets:
                made = generate(pipe, inputs, seed=seed, use_psa=True, preset=preset)
                if made.sparse_density is None:
                    told = f"preset {preset.name!r} ran dense throughout; pass --warmup_steps or more steps."
                    sys.exit(f"{told}\n{made.report}")
                line: dict[str, Any] = {"model": args.model, "preset": preset.name, "prompt": prompt, "seed": seed}
                line |= {"density": round(made.sparse_density, 4), **compare_videos(made.frames, dense.frames)}
                if lpips:
                    line["lpips"] = round(lpips(made.frames, dense.frames), 4)
                lines.append(line)
                bar.update()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, "".join(strict_json(line) + "\n" for line in lines))
    _show(lines)
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="demo", help="entry of configs/models.yaml, folder or hub id (default: demo)"
    )
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="NAME", help=f"(default: {' '.join(PRESETS)})")
    parser.add_argument("--config", type=Path, help="YAML with presets of your own, laid over the built-in file")
    parser.add_argument("--warmup_steps", type=int, help="dense steps of all presets (default: those of the section)")
    parser.add_argument("--lpips", action="store_true", help="LPIPS as well; needs torchvision and AlexNet's weights")
    parser.add_argument("--json", type=Path, help="write one JSON line a video here")
    add_call_options(parser)
    return parser.parse_args(argv)


def choose_presets(args: argparse.Namespace, section: str) -> list[PSAPreset]:
    """The presets of the names that were asked for, with one number of warm-up steps."""
    warmup = load_preset(section).warmup_steps if args.warmup_steps is None else args.warmup_steps
    presets = []
    for name in args.presets:
        if scaled := re.fullmatch(r"published(?:@(0?\.\d+))?", name):
            preset = published_choice(float(scaled[1] or 0.15), name=name)
        else:
            preset = load_preset(section, name, config=args.config)
        presets.append(preset.replace(warmup_steps=warmup))
    return presets


def load_lpips() -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a function of two videos, or end with what is missing: torchmetrics has no backbone of its own."""
    if find_spec("torchvision") is None:
        sys.exit(
            "--lpips compares features of torchvision's AlexNet, and torchvision is not installed: "
            "pip install torchvision, or leave --lpips out"
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="sum", normalize=True)
    except OSError as error:
        sys.exit(
            f"--lpips needs the weights of torchvision's AlexNet, which cannot be loaded: {error}. Put the file into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or leave --lpips out"
        )

    @torch.no_grad()
    def compare(video: np.ndarray, reference: np.ndarray) -> float:
        """Mean over the frames; 0 where they are equal, larger where they look less alike."""
        frames = [torch.from_numpy(x).permute(0, 3, 1, 2).float().split(8) for x in (video, reference)]
        return sum(float(metric(*pair)) for pair in zip(*frames, strict=True)) / len(video)

    return compare


def _show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print a row a preset: the means over its videos, and the worst of them."""
    by_preset = defaultdict(list)
    for line in lines:
        by_preset[line["preset"]].append(line)
    width = max(map(len, by_preset))
    lpips = "lpips" in lines[0]
    print(f"{'preset':{width}}  density    PSNR   worst    SSIM   worst" + ("   LPIPS   worst" if lpips else ""))
    for name, runs in by_preset.items():
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0] if isinstance(runs[0][key], float)}
        row = (
            f"{name:{width}}    {mean['density']:.3f}  {mean['psnr']:6.2f}  {min(run['psnr'] for run in runs):6.2f}  "
            f"{mean['ssim']:.4f}  {min(run['ssim'] for run in runs):.4f}"
        )
        print(row + (f"  {mean['lpips']:.4f}  {max(run['lpips'] for run in runs):.4f}" if lpips else ""))
