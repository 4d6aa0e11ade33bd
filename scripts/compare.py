"""Videos of several presets against dense attention, same seed: PSNR, SSIM, density and time, as a table.

    python scripts/compare.py                                               the demo model, four prompts, 10 minutes
    python scripts/compare.py --model cogvideo_5b --presets published psa_cover psa_fast --prompt_file prompts.txt
    python scripts/compare.py --presets psa_cover my_preset --config my_presets.yaml --json compare.jsonl

``published`` is the choice of levels published with PSA for CogVideoX: shares .10/.05/.20 at factors 1, 2, 8, the rest
skipped, blocks of 128 in Gilbert order, largest sampled score. All presets get the same warm-up steps.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from psa_diffusers.generation import compare_videos, generate, load_pipeline, resolve_model
from psa_diffusers.models.registry import family_of
from psa_diffusers.preset import PSAPreset, load_preset

PROMPTS = (
    "A red ball rolls across a green field and comes to rest beside a blue box.",
    "Rain falls on a lake at night while a small boat drifts past a lighthouse.",
    "Two dogs run through high grass towards the camera.",
    "A slow flight over a city of glass towers at sunrise.",
)
CALL = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt", "guidance_scale_2")
PUBLISHED = PSAPreset(
    name="published", mask_ratios={1: [0, 0.1], 2: [0.1, 0.15], 8: [0.15, 0.35], 0: [0.35, 1]}, importance="sampled_max"
)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="demo", help="entry of configs/models.yaml, folder or hub id (default: demo)"
    )
    parser.add_argument(
        "--presets", nargs="+", default=["published", "psa_cover", "psa_fast", "psa_quality"], metavar="NAME"
    )
    parser.add_argument("--config", type=Path, help="YAML with presets of your own, laid over the built-in file")
    parser.add_argument("--prompt_file", type=Path, help="one prompt a line (default: four prompts of our own)")
    parser.add_argument("--warmup_steps", type=int, help="dense steps of all presets (default: those of the section)")
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps (default: those of the model)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first prompt, the next has one more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write one JSON line a video here")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    config = resolve_model(args.model)
    pipe = load_pipeline(config, device=args.device)
    call = {name: getattr(config, name) for name in CALL if getattr(config, name) is not None}
    if args.num_inference_steps:
        call["num_inference_steps"] = args.num_inference_steps
    prompts = args.prompt_file.read_text(encoding="utf-8").splitlines() if args.prompt_file else PROMPTS
    prompts = [prompt for prompt in prompts if prompt.strip()]
    section = family_of(pipe.transformer).section_of(pipe.transformer, pipe)[0]
    warmup = load_preset(section).warmup_steps if args.warmup_steps is None else args.warmup_steps
    presets = [
        (PUBLISHED if name == "published" else load_preset(section, name, config=args.config)).replace(
            warmup_steps=warmup
        )
        for name in args.presets
    ]
    lines = []
    with tqdm(total=len(prompts) * (1 + len(presets)), unit="video", disable=None) as bar:
        for number, prompt in enumerate(prompts):
            inputs = {**call, "prompt": prompt}
            dense = generate(pipe, inputs, seed=args.seed + number)
            bar.update()
            for preset in presets:
                run = generate(pipe, inputs, seed=args.seed + number, use_psa=True, preset=preset)
                lines.append(
                    {
                        "model": args.model,
                        "preset": preset.name,
                        "prompt": prompt,
                        "density": run.sparse_density,
                        **compare_videos(run.frames, dense.frames),
                        "seconds": round(run.seconds, 2),
                        "dense_seconds": round(dense.seconds, 2),
                    }
                )
                bar.update()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    show(lines)


def show(lines):
    by_preset = defaultdict(list)
    for line in lines:
        by_preset[line["preset"]].append(line)
    width = max(map(len, by_preset))
    print(f"{'preset':{width}}  density    PSNR   worst    SSIM   worst   seconds (dense)")
    for name, runs in by_preset.items():
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0] if isinstance(runs[0][key], float)}
        print(
            f"{name:{width}}    {mean['density']:.3f}  {mean['psnr']:6.2f}  {min(run['psnr'] for run in runs):6.2f}  "
            f"{mean['ssim']:.4f}  {min(run['ssim'] for run in runs):.4f}   {mean['seconds']:.1f} "
            f"({mean['dense_seconds']:.1f})"
        )


if __name__ == "__main__":
    sys.exit(main())
