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

import argparse
import logging
import sys
from pathlib import Path


def parse(argv=None):
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


def read_prompts(args, config):
    if args.prompt_file is not None:
        if not args.prompt_file.is_file():
            raise FileNotFoundError(f"no prompt file at {args.prompt_file}")
        lines = (line.strip() for line in args.prompt_file.read_text(encoding="utf-8").splitlines())
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise ValueError(f"{args.prompt_file} holds no prompt: write one a line")
        return prompts
    prompt = args.prompt or config.example_prompt
    if not prompt:
        raise ValueError("this model has no example prompt: pass --prompt")
    return [prompt]


def check_words(prompts, tokenizer, example):
    """Refuse prompts with words that the demo model was never shown: it would draw something else without a word."""
    from psa_diffusers.cli.demo import unknown_words

    for prompt in prompts:
        if unknown := unknown_words(tokenizer, prompt):
            raise ValueError(
                f"the demo model does not know {', '.join(unknown)}, in {prompt!r}; it knows the words of "
                f"docs/developer/miniature.md, as in {example!r}"
            )


def call_arguments(args, config, pipe, recipe):
    """Arguments of the pipeline: the entry's, overruled by those that a few-step LoRA needs and by the command line.

    An unknown model has its own defaults.
    """
    from psa_diffusers.cli.generation import call_defaults

    names = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt")
    more = ("guidance_scale_2", "max_sequence_length")
    known = {} if config.name == "custom" else {name: getattr(config, name) for name in (*names, *more)}
    given = {name: getattr(args, name) for name in names}
    chosen = {**call_defaults(pipe, names), **known, **(recipe.call if recipe else {})}
    chosen |= {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in chosen.items() if value is not None}


def main(argv=None):
    args = parse(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    from psa_diffusers.cli import generation  # late: --help answers at once
    from psa_diffusers.presets.model_entries import LoraSource
    from psa_diffusers.presets.schema import parse_overrides

    try:
        config = generation.resolve_model(args.model, args.models_config)
        prompts = read_prompts(args, config)
        overrides = parse_overrides(args.set)
        if args.compare:
            generation.check_metrics()
        device = args.device or generation.device_of_process()
        lora = LoraSource(args.lora_path, args.lora_weight_name) if args.lora_path else None
        print(f"model {args.model} on {device}: loading ...", flush=True)
        pipe = generation.load_pipeline(config, device=device, lora=lora)
        if config.source is None:
            check_words(prompts, pipe.tokenizer, config.example_prompt)
        job = Job(args, config, pipe, device, overrides, lora or config.lora)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output_dir.mkdir(parents=True, exist_ok=True)
    job.warm_up()
    job.run_all(prompts)
    return 0


class Job:
    """The prompts of one command: one pipeline, one set of settings."""

    def __init__(self, args, config, pipe, device, overrides, lora):
        from psa_diffusers.cli import generation
        from psa_diffusers.lora import recipe_of

        self.args, self.config, self.pipe, self.device = args, config, pipe, device
        recipe = recipe_of(pipe)
        self.call = call_arguments(args, config, pipe, recipe)
        preset, section = args.attention_preset, config.attention_model
        if preset is None:
            section, preset = recipe.preset if recipe else (section, config.attention_preset)
        self.psa = {
            "preset": preset,
            "section": section,
            "config": args.config,
            "overrides": overrides,
        }
        # all that decides what the video looks like: it is written down, and names the files
        self.settings = {
            "model": args.model,
            "source": config.source,
            "revision": generation.revision(pipe),
            "pipeline": type(pipe).__name__,
            "scheduler": {"class_name": type(pipe.scheduler).__name__, **generation.plain_config(pipe.scheduler)},
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "call": self.call,
            "image": args.image,
            "lora": None if lora is None else vars(lora),
            "use_psa": args.use_psa,
            "compare": args.compare,
            "preset": generation.preset_for(pipe, **self.psa).to_dict() if args.use_psa else None,
        }
        if args.image:
            from diffusers.utils import load_image

            self.call = {**self.call, "image": load_image(args.image)}

    def warm_up(self):
        """On a GPU the first sparse step compiles kernels: let a run of few steps pay for that."""
        if self.device == "cpu" or self.args.no_warmup:
            return
        from psa_diffusers.cli import generation

        print("untimed first run (--no_warmup skips it) ...", flush=True)
        call = {**self.call, "prompt": "warm-up", "num_inference_steps": 2}
        overrides = {**self.psa["overrides"], "warmup_steps": 1}
        generation.generate(self.pipe, call, seed=0, use_psa=self.args.use_psa, **{**self.psa, "overrides": overrides})

    def run_all(self, prompts):
        """Do those prompts that are not finished and that no other process has claimed."""
        from contextlib import closing

        from tqdm import tqdm

        from psa_diffusers.cli import generation
        from psa_diffusers.cli.worklist import share_out

        seeds = [self.args.seed + index for index in range(len(prompts))]
        names = [
            generation.output_name(index, prompt, seed, self.settings)
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

    def files(self, name):
        return [self.args.output_dir / f"{name}{suffix}" for suffix in (".mp4", ".json")]

    def is_finished(self, name):
        return all(path.is_file() for path in self.files(name))

    def run_one(self, name, prompt, seed):
        from psa_diffusers.cli import generation

        video, record = self.files(name)
        for half in self.args.output_dir.glob(f".{name}.*part*"):
            half.unlink()  # of a process that was killed: this one has the claim now
        call = {**self.call, "prompt": prompt}
        print(f"prompt: {prompt}", flush=True)
        dense = None
        if self.args.compare:
            print("dense attention:", flush=True)
            dense = generation.generate(self.pipe, call, seed=seed)
        print("pyramid sparse attention:" if self.args.use_psa else "dense attention:", flush=True)
        run = generation.generate(self.pipe, call, seed=seed, use_psa=self.args.use_psa, **self.psa)
        frames = run.frames
        result = {"seconds": run.seconds, "denoising_seconds": run.denoising_seconds}
        if self.args.use_psa:
            result |= {"density": run.density, "sparse_density": run.sparse_density}
        if dense is not None:
            import numpy as np

            frames = np.concatenate([dense.frames, run.frames], axis=2)
            result |= {"dense_seconds": dense.seconds, "dense_denoising_seconds": dense.denoising_seconds}
            result |= {"speedup": dense.seconds / run.seconds, **generation.compare_videos(run.frames, dense.frames)}
            if run.denoising_seconds:
                result["denoising_speedup"] = dense.denoising_seconds / run.denoising_seconds
        generation.write_video(video, frames, self.config.fps)
        machine = generation.environment(self.device)
        generation.write_json(
            record,
            {
                "command": ["scripts/generate.py", *sys.argv[1:]],
                "prompt": prompt,
                "seed": seed,
                "video": video.name,
                "frames": list(run.frames.shape),
                "fps": self.config.fps,
                **self.settings,
                "entry": self.config.to_dict(),
                "report": run.report,
                "result": result,
                "environment": machine,
            },
        )
        self.tell(video, run, result)

    def tell(self, video, run, result):
        if self.args.verbose and run.report:
            print(run.report)
        if "speedup" in result:
            line = f"dense {result['dense_seconds']:.1f} s, PSA {run.seconds:.1f} s: {result['speedup']:.2f}x as fast"
            if "denoising_speedup" in result:
                line += f" ({result['denoising_speedup']:.2f}x in the denoising steps)"
            print(line + f"; PSNR {result['psnr']:.1f} dB, SSIM {result['ssim']:.3f} against dense")
            print("left: dense, right: PSA")
        if run.sparse_density is not None:
            print(f"density {run.sparse_density:.3f} in the sparse steps, {run.density:.3f} over all steps (dense = 1)")
        elif run.report:
            print("nothing ran sparse:\n" + run.report)
        print(f"{run.seconds:.1f} s  {video}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
