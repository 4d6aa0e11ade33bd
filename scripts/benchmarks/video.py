"""Time whole videos, dense and with PSA, in one process on one GPU: real pipelines at real sizes with random weights.

    python -m scripts.benchmarks.video --models wan2.1-1.3b-480p
    python -m scripts.benchmarks.video --settings eager compiled fp8 --json docs/benchmarks/whole_video.jsonl
    python -m scripts.benchmarks.video --models wan2.1-1.3b-480p --steps 50       every step timed, nothing added up

Each line is a whole call of the pipeline: denoising steps with guidance, the scheduler, the decoding of the video. The
text encoder is timed apart, alone. Seconds of a run of --as_steps steps are a sum: a call of --steps steps is timed
step by step, and each kind of step (dense; sparse, as its preset says for that part of the run) counts as often as it
occurs in the long run. With --steps equal to --as_steps nothing is added up. Where the call is too short to meet every
kind, the program stops and says so.

Before anything is timed, a preset that reads everything must give the latents of dense attention on a short video; it
may differ by twice what another dense kernel differs by. Random weights make a video of noise; they cost what trained
ones cost, since presets by rank read a fixed share. Settings: `eager`; `compiled`, each block of the denoiser; `fp8`,
compiled, its linear layers in FP8 with a scale a row (torchao). Peak memory is torch's, of the whole call.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from psa_diffusers import disable_psa, enable_psa, psa_report
from psa_diffusers.cli.generation import environment
from psa_diffusers.pipelines.state import state_of

from .timing import relative_error
from .whole_models import MODELS, on

SETTINGS = ("eager", "compiled", "fp8")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != "smoke"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["eager"], help="default: eager")
    parser.add_argument("--presets", nargs="+", default=["psa_cover", "psa_fast"], help="default: psa_cover psa_fast")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a timed call (default: 4)")
    parser.add_argument(
        "--as_steps", type=int, default=50, help="denoising steps of the run that is told (default: 50)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="append a line of JSON for each result to this file")
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error("--steps must be at least 3: the first step of a call is slower, and there are two kinds of steps")
    return args


class Watch:
    """Seconds of each denoising step of a call, and of what comes behind the last one."""

    def __init__(self, pipe, device):
        self.device = device
        self.hook = pipe.transformer.register_forward_pre_hook(self._begin)
        self.begun = None
        self.ends = []

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self, *_):
        if self.begun is None:
            self.begun = self.now()

    def __call__(self, pipe, step, timestep, tensors):
        self.ends.append(self.now())
        return {}

    def steps(self):
        return [end - start for start, end in zip([self.begun, *self.ends], self.ends, strict=False)]


class Bench:
    """One pipeline in one setting."""

    def __init__(self, name, setting, args):
        self.name, self.setting, self.args = name, setting, args
        self.model, self.device = MODELS[name], torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        self.pipe = self.model.build(self.device, self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        if self.model.tiled:
            self.pipe.vae.enable_tiling()
        self.embeds = self.model.embeds(self.device, self.dtype)
        # before anything is compiled: compiled code keeps the kernel that it was made with
        self.allowed = 2 * self.rounding()
        if setting == "fp8":
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

            quantize_(self.pipe.transformer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        if setting != "eager":
            for block in self.blocks():
                block.compile()

    def blocks(self):
        """The layers of the denoiser, whatever its class calls them."""
        lists = [part for part in self.pipe.transformer.children() if isinstance(part, torch.nn.ModuleList)]
        return [block for part in lists for block in part if hasattr(block, "attn") or hasattr(block, "attn1")]

    def call(self, steps, frames=None, output_type="pt", watch=None):
        height, width, whole = self.model.video
        return self.pipe(
            **self.embeds,
            **self.model.call,
            height=height,
            width=width,
            num_frames=frames or whole,
            num_inference_steps=steps,
            generator=torch.Generator(self.device).manual_seed(1),
            output_type=output_type,
            callback_on_step_end=watch,
        ).frames

    def rounding(self):
        """Relative L1 error of one step on a short video between two dense kernels."""
        dense = self.call(1, frames=17, output_type="latent")
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return relative_error(self.call(1, frames=17, output_type="latent"), dense)

    def check(self):
        """Reading everything is dense attention, to twice what another dense kernel differs by."""
        dense = self.call(1, frames=17, output_type="latent")
        enable_psa(self.pipe, mask_ratios={1: [0, 1]}, warmup_steps=0, layers={}, steps={})
        error = relative_error(self.call(1, frames=17, output_type="latent"), dense)
        disable_psa(self.pipe)
        if not error <= self.allowed and self.device.type == "cuda":
            sys.exit(
                f"{self.name}, {self.setting}: reading everything differs from dense attention by {error:.1e}, "
                f"allowed {self.allowed:.1e}"
            )
        return {"gate_relative_l1": error, "gate_allowed": self.allowed}

    def run(self, preset):
        """Time one call, dense if preset is None; return a line."""
        args = self.args
        kinds = ["dense"] * args.as_steps, ["dense"] * args.steps
        density = 1.0
        if preset is not None:
            density = self.density(preset) if self.setting == "eager" else None
            enable_psa(self.pipe, preset)
            warmup = state_of(self.pipe).switch.run.preset.warmup_steps
            is_short = args.steps < args.as_steps
            enable_psa(self.pipe, preset, **({"warmup_steps": min(warmup, 1)} if is_short else {}))
            kinds = self.kinds(warmup, args.as_steps), self.kinds(min(warmup, 1) if is_short else warmup, args.steps)
        self.call(1 if preset is None else 2, output_type="latent")  # tunes, compiles, fills caches
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        watch = Watch(self.pipe, self.device)
        start = watch.now()
        video = self.call(args.steps, watch=watch)
        end = watch.now()
        watch.hook.remove()
        disable_psa(self.pipe)
        steps, decoding = watch.steps(), end - watch.ends[-1]
        seconds = {kind: [s for s, k in zip(steps, kinds[1], strict=True) if k == kind] for kind in set(kinds[1])}
        if missing := set(kinds[0]) - set(seconds):
            sys.exit(
                f"{self.name}, {preset}: {args.steps} steps do not meet {len(missing)} kinds of steps: raise --steps"
            )
        typical = {kind: statistics.median(times) for kind, times in seconds.items()}
        is_sum = args.steps != args.as_steps
        total = sum(typical[kind] for kind in kinds[0]) if is_sum else sum(steps)
        return {
            "preset": preset or "dense",
            "steps": args.as_steps,
            "seconds": round(total + decoding, 2),
            "is_sum": is_sum,
            "timed_steps": args.steps,
            "dense_steps": kinds[0].count("dense"),
            "step_seconds": [round(s, 4) for s in steps],
            "decoding_seconds": round(decoding, 3),
            "before_steps_seconds": round(watch.begun - start, 3),
            "sparse_density": density and round(density, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device.type == "cuda" else None,
            "finite": bool(torch.isfinite(torch.as_tensor(video)).all()),
        }

    def density(self, preset):
        """Mean density of the sparse calls of a step, from the report; it breaks graphs, so not in a timed call."""
        enable_psa(self.pipe, preset, warmup_steps=0, report=True)
        self.call(1, output_type="latent")
        records = [record["density"] for record in psa_report(self.pipe).records if record["kind"] == "sparse"]
        disable_psa(self.pipe)
        return statistics.fmean(records)

    def kinds(self, warmup, num_steps):
        """What each step of a run is: `"dense"`, or the settings of every layer."""
        switch = state_of(self.pipe).switch
        preset, layers = switch.run.preset, len(switch.processors)
        last = num_steps - preset.dense_last_steps
        settings = [tuple(preset.at(step, num_steps, i, layers) for i in range(layers)) for step in range(num_steps)]
        return ["dense" if not warmup <= step < last else settings[step] for step in range(num_steps)]

    def text_seconds(self):
        """Seconds of the text encoder, for the prompts of a call."""
        if self.model.text_encoder is None or self.device.type != "cuda":
            return None
        encoder = on(self.device, self.dtype, self.model.text_encoder)
        tokens = torch.ones(2, self.model.text_tokens, dtype=torch.long, device=self.device)
        times = []
        with torch.no_grad():
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                encoder(tokens)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        return round(min(times), 4)


def main(argv=None):
    args = parse(argv)
    machine = environment(args.device)
    torch._dynamo.config.recompile_limit = 64  # several presets and two sizes of video in one process
    for name in args.models:
        for setting in args.settings:
            torch._dynamo.reset()
            bench = Bench(name, setting, args)
            height, width, frames = bench.model.video
            base = {"model": name, "setting": setting, "height": height, "width": width, "frames": frames}
            base |= {"dtype": str(bench.dtype).removeprefix("torch."), **bench.check()}
            base |= {"text_encoder_seconds": bench.text_seconds() if setting == args.settings[0] else None}
            dense = None
            for preset in (None, *args.presets):
                line = base | bench.run(preset)
                dense = dense or line["seconds"]
                line |= {"speedup": round(dense / line["seconds"], 3), **machine}
                show(line)
                if args.json is not None:
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line, allow_nan=False) + "\n")
            del bench
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return 0


def show(line):
    steps = line["step_seconds"]
    print(
        f"{line['model']:22} {line['setting']:9} {line['preset']:12} {line['seconds']:8.1f} s {line['speedup']:5.2f}x  "
        f"first step {steps[0]:.3f} s, last {steps[-1]:.3f}, decoding {line['decoding_seconds']:.1f}  "
        f"density {line['sparse_density']}  {line['peak_gib']} GiB",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
