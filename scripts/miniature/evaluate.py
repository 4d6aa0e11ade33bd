"""Generate clips of held-out prompts and read from their pixels whether they show what the prompts say.

    python -m scripts.miniature.evaluate --model demo --prompts 8                           a first look, on a CPU
    python -m scripts.miniature.evaluate --model runs/wan/pipeline --rows dense psa_cover psa_fast --sheet wan.png
    python -m scripts.miniature.evaluate --model demo --lora psa=psa.safetensors --rows dense dense@4 psa:psa_fast@4

A row is [LORA:][SECTION/]PRESET[@STEPS[gGUIDANCE]]: `dense` or a preset, of the model's own section of the preset file
or of another (CogVideo_5b/psa_balanced), the number of steps, and a LoRA named with --lora. The same prompt has the
same seed in every row. PSNR and SSIM are those against the first row that a model generated. Two rows need no model:
`rendered`, the ground truth, and `restored`, the same after encoding and decoding: what is wrong there is the
evaluator's own error.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_TRUTH = ("rendered", "restored")
_ROW = re.compile(r"(?:(?P<lora>\w+):)?(?P<preset>[\w./-]+)(?:@(?P<steps>\d+)(?:g(?P<guidance>\d+(?:\.\d+)?))?)?")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="folder of a pipeline of the miniature world, or models.yaml entry"
    )
    parser.add_argument("--rows", nargs="+", default=["dense", "psa_balanced", "psa_cover", "psa_fast"], metavar="ROW")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts (default: 64)")
    parser.add_argument("--prompt_file", type=Path, help="prompts of the grammar instead, one a line")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="of rows without @STEPS (default: 50)")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="of rows that set none; LoRA rows have 1")
    parser.add_argument("--size", type=int, nargs=2, metavar=("PIXELS", "FRAMES"), help="(default: the model's)")
    parser.add_argument("--warmup_steps", type=int, help="dense steps of all presets (default: the preset's own)")
    parser.add_argument("--config", type=Path, help="YAML with presets of your own")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME=FILE", help="LoRA for rows NAME:...; repeatable"
    )
    parser.add_argument("--batch", type=int, help="prompts at a time (default: 16 on a GPU, 1 on a CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the noise")
    parser.add_argument("--device", help="cuda or cpu (default: the GPU if there is one)")
    parser.add_argument("--json", type=Path, help="write everything here, after each row")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    parser.add_argument("--sheet_prompts", type=int, default=12, help="prompts on the sheet (default: 12)")
    parser.add_argument("--record", type=Path, help="write q, k and v of the first prompt's dense run here")
    args = parser.parse_args(argv)
    wrong = [row for row in args.rows if not _ROW.fullmatch(row)]
    if wrong:
        parser.error(f"no row: {wrong[0]!r}; expected [LORA:][SECTION/]PRESET[@STEPS[gGUIDANCE]], such as psa_cover@20")
    args.lora = dict(
        pair.split("=", 1) if "=" in pair else parser.error(f"--lora {pair}: expected NAME=FILE") for pair in args.lora
    )
    unknown = [row for row in args.rows if (name := _ROW.fullmatch(row)["lora"]) and name not in args.lora]
    if unknown:
        parser.error(f"row {unknown[0]!r} asks for a LoRA that no --lora NAME=FILE names")
    return args


def main(argv=None):
    args = parse(argv)
    import torch  # late: --help answers at once

    from . import world

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.prompt_file:
            lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
            scenes = [world.parse_prompt(line) for line in lines if line.strip()]
        else:
            scenes = world.held_out_scenes(args.prompts, args.seed)
        pipe = load(args.model, device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    evaluation = Evaluation(args, pipe, device, scenes)
    clips, reference = {}, None
    for row in args.rows:
        clips[row], facts = evaluation.make(row)
        evaluation.judge(row, clips[row], reference, facts)
        if reference is None and row not in _TRUTH:
            reference = clips[row]
        if args.json:  # a row can take an hour: what there is, stands there
            evaluation.write(args.json)
    evaluation.show_details()
    if args.sheet:
        draw_sheet(args.sheet, scenes[: args.sheet_prompts], clips, evaluation.results)
    if args.record:
        evaluation.record(args.record)
    return 0


def load(model, device):
    """A pipeline in the precision that suits the device, silent."""
    import torch

    from psa_diffusers.cli.generation import load_pipeline, resolve_model

    pipe = load_pipeline(resolve_model(model), device=device)
    # bfloat16 everywhere: half the time on a GPU; on a CPU float32
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        for weight in part.parameters():
            weight.data = weight.data.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Evaluation:
    """Clips of the same prompts in several rows, and what is right in each."""

    def __init__(self, args, pipe, device, scenes):
        config = pipe.transformer.config
        self.args, self.pipe, self.device, self.scenes = args, pipe, device, scenes
        # Wan's denoiser does not say for which size it was made: that of its sibling
        own = (config.sample_height * 4, config.sample_frames) if "sample_frames" in config else (128, 49)
        self.pixels, self.frames = args.size or own
        self.batch = args.batch or (16 if device.startswith("cuda") else 1)
        self.results = {}

    def make(self, row):
        """Clips ``[frames, height, width, 3]`` of a row in [0, 1], and how they were made."""
        if row in _TRUTH:
            return self._render(restored=row == "restored"), {}
        match = _ROW.fullmatch(row)
        steps = int(match["steps"] or self.args.num_inference_steps)
        guidance = float(match["guidance"] or (1.0 if match["lora"] else self.args.guidance_scale))
        facts = {"steps": steps, "guidance": guidance}
        if match["lora"]:
            from psa_diffusers import load_psa_lora

            # four steps of the miniature's own schedule, not those of a published LoRA
            load_psa_lora(self.pipe, self.args.lora[match["lora"]], few_steps=False)
        try:
            clips, more = self._generate(row, match["preset"], steps, guidance)
        finally:
            if match["lora"]:
                self.pipe.unload_lora_weights()
        return clips, facts | more

    def call(self, places, steps, guidance):
        """Arguments of the pipeline's call for some of the prompts."""
        import torch

        return {
            "prompt": [self.scenes[place].prompt for place in places],
            "height": self.pixels,
            "width": self.pixels,
            "num_frames": self.frames,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "max_sequence_length": 32,
            "generator": [torch.Generator("cpu").manual_seed(self.args.seed * 1000 + place) for place in places],
            "output_type": "np",
        }

    def _generate(self, row, preset, steps, guidance):
        import torch
        from tqdm import tqdm

        from psa_diffusers import disable_psa, enable_psa, load_preset, psa_report

        clips, densities, seconds = [], defaultdict(list), 0.0
        if preset != "dense":
            changes = {} if self.args.warmup_steps is None else {"warmup_steps": self.args.warmup_steps}
            config = self.args.config
            if "/" in preset:
                preset, changes, config = load_preset(*preset.split("/"), config=config, **changes), {}, None
            enable_psa(self.pipe, preset, config=config, report=True, **changes)
        try:
            for start in tqdm(range(0, len(self.scenes), self.batch), desc=row, leave=False):
                places = range(start, min(start + self.batch, len(self.scenes)))
                began = time.perf_counter()
                clips += list(self.pipe(**self.call(places, steps, guidance)).frames)
                if self.device.startswith("cuda"):
                    torch.cuda.synchronize()
                seconds += time.perf_counter() - began
                if preset != "dense":
                    for record in psa_report(self.pipe).records:
                        densities["all"].append(record["density"])
                        densities[record["kind"]].append(record["density"])
        finally:
            disable_psa(self.pipe)
        mean = {kind: sum(values) / len(values) for kind, values in densities.items()}
        return clips, {
            "density": mean.get("sparse", 1.0 if preset == "dense" else None),
            "density_all_steps": mean.get("all", 1.0),
            "seconds": seconds / len(self.scenes),
        }

    def _render(self, *, restored):
        import random

        import torch

        from . import world

        clips = []
        for place, scene in enumerate(self.scenes):
            packed = world.pack([scene], random.Random(f"{self.args.seed} {place}"))
            packed = {name: value.to(self.device) for name, value in packed.items()}
            video = world.render(packed, frames=self.frames, size=self.pixels)
            if restored:
                vae = self.pipe.vae
                with torch.no_grad():
                    video = vae.decode(vae.encode(video.to(vae.dtype)).latent_dist.mode()).sample
            clips.append(((video[0].float().permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1).cpu().numpy())
        return clips

    def judge(self, row, clips, reference, facts):
        """Compare every clip with its prompt and, if there is one, with the reference; print a line."""
        import os

        import torch

        from . import world

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            judged = list(pool.map(self._judge_one, self.scenes, clips, reference or [None] * len(clips)))
        torch.set_num_threads(threads)
        by_name, by_kind = defaultdict(list), defaultdict(list)
        for scene, one in zip(self.scenes, judged, strict=True):
            by_kind[scene.kind].append(all(one["right"].values()))
            for name, is_right in one["right"].items():
                by_name[name.removesuffix(" 2")].append(is_right)
        self.results[row] = {
            **facts,
            "adherence": _mean(all(one["right"].values()) for one in judged),
            "attributes": {name: _mean(values) for name, values in by_name.items()},
            "kinds": {kind: _mean(by_kind[kind]) for kind in world.KINDS if kind in by_kind},
            "flicker": _mean(one["flicker"] for one in judged),
            **{name: _mean(one[name] for one in judged) for name in ("psnr", "ssim") if name in judged[0]},
            "prompts": [{"prompt": scene.prompt, **one} for scene, one in zip(self.scenes, judged, strict=True)],
        }
        if len(self.results) == 1:
            width = max(map(len, self.args.rows))
            print(f"{'row':{width}}  adherence  attributes  density   PSNR   SSIM  flicker  s/clip")
        result = self.results[row]
        every = _mean(value for one in judged for value in one["right"].values())
        forms = {"density": "7.3f", "psnr": "5.1f", "ssim": "5.3f", "flicker": "7.2f", "seconds": "6.2f"}
        cells = [f"{100 * result['adherence']:7.1f} %", f"{100 * every:8.1f} %"]
        for name, form in forms.items():
            value = result.get(name)
            cells.append(" " * int(form[0]) if value is None else f"{value:{form}}")
        print(f"{row:{max(map(len, self.args.rows))}}  " + "  ".join(cells), flush=True)

    def _judge_one(self, scene, clip, reference):
        import numpy as np

        from psa_diffusers.cli.generation import compare_videos

        from . import measure

        clip = np.asarray(clip, dtype=np.float32)
        seen = measure.describe(clip)
        # second differences in time, in steps of 8 bits: what moves evenly has none
        flicker = float(np.abs(np.diff(clip, 2, axis=0)).mean() * 255)
        one = {"right": measure.compare(scene, seen), "seen": repr(seen), "flicker": flicker}
        if reference is not None:
            one |= compare_videos(clip, np.asarray(reference, dtype=np.float32))
        return one

    def show_details(self):
        """What is right of every attribute, and of every kind of scene."""
        width = max(map(len, (*self.results, "all attributes right, in %")))
        for title, part in (("attribute right, in %", "attributes"), ("all attributes right, in %", "kinds")):
            names = list(dict.fromkeys(name for result in self.results.values() for name in result[part]))
            print(f"\n{title:{width}}  " + "  ".join(f"{name:>5}" for name in names))
            for row, result in self.results.items():
                cells = (f"{100 * result[part].get(name, 0):{max(5, len(name))}.0f}" for name in names)
                print(f"{row:{width}}  " + "  ".join(cells))

    def write(self, path):
        from psa_diffusers.cli.generation import environment, write_json

        settings = {"model": self.args.model, "seed": self.args.seed, "frames": self.frames, "pixels": self.pixels}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**settings, "rows": self.results, "environment": environment(self.device)})

    def record(self, path):
        """q, k, v of one dense run, at four steps: what `scripts.benchmarks.levels --qkv` reads."""
        from psa_diffusers import record_qkv

        steps = self.args.num_inference_steps
        with record_qkv(self.pipe, path, steps=sorted({0, steps // 3, 2 * steps // 3, steps - 1})):
            self.pipe(**self.call([0], steps, self.args.guidance_scale))


def _mean(values):
    values = [float(value) for value in values]
    return round(sum(values) / len(values), 4) if values else 0.0


def draw_sheet(path, scenes, clips, results):
    """Five frames of each clip, the prompt above; with several rows, each row's clips below each other."""
    import numpy as np
    from PIL import Image, ImageDraw

    names = list(clips)
    size = np.asarray(clips[names[0]][0]).shape[1]
    columns = 2 if len(names) == 1 else 1
    strip, line = 5 * (size + 2), 14
    label = 0 if len(names) == 1 else 110
    block = line + len(names) * (size + 2)
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * (label + strip + 8), rows * block), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, scene in enumerate(scenes):
        left, top = (number % columns) * (label + strip + 8), (number // columns) * block
        if label:
            draw.text((left + label, top + 1), scene.prompt, fill=(0, 0, 0))
        for place, name in enumerate(names):
            clip = np.asarray(clips[name][number], dtype=np.float32)
            y = top + line + place * (size + 2)
            wrong = [key for key, is_right in results[name]["prompts"][number]["right"].items() if not is_right]
            note = f"wrong: {', '.join(wrong)}" if wrong else ""
            if label:
                draw.text((left + 2, y + 2), f"{name}\n{note}", fill=(200, 0, 0) if wrong else (0, 0, 0))
            else:
                draw.text((left, top + 1), f"{scene.prompt} {note}", fill=(200, 0, 0) if wrong else (0, 0, 0))
            for column, frame in enumerate(np.linspace(0, len(clip) - 1, 5).round().astype(int)):
                image = Image.fromarray((clip[frame].clip(0, 1) * 255).round().astype(np.uint8))
                sheet.paste(image, (left + label + column * (size + 2), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    sys.exit(main())
