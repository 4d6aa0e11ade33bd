"""Time a Wan denoiser on one GPU and over several, with dense attention and with PSA; needs no network and no weights.

    torchrun --nproc_per_node=2 -m scripts.benchmarks.parallel
    torchrun --nproc_per_node=2 -m scripts.benchmarks.parallel --shape wan2.1-1.3b-480p --layers 8

The denoiser has the width, heads and tokens of the real one, random weights, and a few of its layers, all alike. Every
process first runs it alone; then its tokens are split by diffusers' context parallelism (Ulysses). Before a time is
taken, several GPUs have to give what one gives. Times are medians, of the slowest process, after two untimed forwards.
Efficiency is the speed-up over one GPU, divided by the number of GPUs.

Random weights make all heads alike; here the heads of every layer range from diffuse to peaked, as trained ones do, so
that a preset by accumulated importance reads more in some than in others. Its heads are dealt to the processes by their
cost; the line says what that gains.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from .timing import relative_error

ROUNDING = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}  # relative L1 of two ways to round the same forward


@dataclass(frozen=True)
class DenoiserShape:
    """A denoiser that somebody runs: its size, and the latents of a video."""

    section: str
    heads: int
    head_dim: int
    ffn_dim: int
    latents: tuple[int, int, int]


SHAPES = {
    "wan2.1-14b-720p": DenoiserShape("Wan2.1_14b", 40, 128, 13824, (21, 90, 160)),
    "wan2.1-14b-480p": DenoiserShape("Wan2.1_14b", 40, 128, 13824, (21, 60, 104)),
    "wan2.1-1.3b-480p": DenoiserShape("Wan2.1_1.3b", 12, 128, 8960, (21, 60, 104)),
    "wan2.2-5b-704p": DenoiserShape("Wan2.2_5B", 24, 128, 14336, (31, 44, 80)),
    "smoke": DenoiserShape("Wan2.1_1.3b", 4, 32, 64, (4, 16, 16)),  # for a CPU: whether the program runs
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wan2.1-14b-720p")
    parser.add_argument("--layers", type=int, default=4, help="layers of the denoiser (default: 4)")
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["psa_cover", "psa_balanced"],
        help="presets of the model's section (default: psa_cover psa_balanced, by rank and by accumulated importance)",
    )
    parser.add_argument("--dtype", choices=tuple(ROUNDING), default="bfloat16")
    parser.add_argument("--backend", default="_native_cudnn", help="dense kernel of diffusers (default: _native_cudnn)")
    parser.add_argument("--repeats", type=int, default=5, help="timed forwards (default: 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/parallel.jsonl"), help="file to append to")
    return parser.parse_args(argv)


def build(shape, layers, dtype, device):
    """A pipeline with nothing but a denoiser; the same weights in every process."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        denoiser = WanTransformer3DModel(
            num_attention_heads=shape.heads, attention_head_dim=shape.head_dim, ffn_dim=shape.ffn_dim, num_layers=layers
        )
    torch.set_default_dtype(torch.float32)
    for block in denoiser.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            by_head = torch.linspace(0.5, 3.0, shape.heads, device=device)
            norm.weight.data.copy_(by_head.repeat_interleave(shape.head_dim))
    for weight in denoiser.parameters():
        dist.broadcast(weight.data, 0)
    return WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), denoiser.eval())


def inputs_for(denoiser, shape, dtype, device):
    latents = torch.randn(1, denoiser.config.in_channels, *shape.latents, device=device)
    # neighbours alike, as in a video: white noise would make every attention flat
    latents = torch.nn.functional.avg_pool3d(latents, (1, 5, 5), stride=1, padding=(0, 2, 2)) * 5
    text = torch.randn(1, 512, denoiser.config.text_dim, device=device)
    for values in (latents, text):
        dist.broadcast(values, 0)
    return {
        "hidden_states": latents.to(dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": text.to(dtype),
        "return_dict": False,
    }


def parallelise(denoiser, device):
    from diffusers import ContextParallelConfig

    size = dist.get_world_size()
    if device.type == "cuda":
        denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
        return
    # enable_parallelism wants accelerators; on a CPU this does the same
    from diffusers.hooks import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), size, device, mesh=mesh)
    for module in denoiser.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(denoiser, config, denoiser._cp_plan)


class Bench:
    """The pipeline, its inputs, and how one kind of attention is switched on and measured."""

    def __init__(self, args, shape, device):
        self.args, self.shape, self.device = args, shape, device
        self.dtype = getattr(torch, args.dtype)
        self.pipe = build(shape, args.layers, self.dtype, device)
        self.inputs = inputs_for(self.pipe.transformer, shape, self.dtype, device)

    def forward(self):
        return self.pipe.transformer(**self.inputs)[0]

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def time_forward(self, preset, deals=True):
        """Seconds (of the slowest process), output, and the density of each process."""
        from psa_diffusers import disable_psa, enable_psa, load_preset, psa_report
        from psa_diffusers.pipelines.state import state_of

        density = 1.0
        if preset is not None:
            chosen = load_preset(self.shape.section, preset, warmup_steps=0, dense_last_steps=0)
            enable_psa(self.pipe, chosen, report=True)
            if not deals:
                for block in self.pipe.transformer.blocks:
                    block.attn1.processor.dealer.is_needed = lambda *args: False
            self.forward()  # deals the heads; compiles kernels
            state_of(self.pipe).switch.run.recorder.clear()
        out = self.forward()
        if preset is not None:
            records = psa_report(self.pipe).records
            dense = {record["reason"] for record in records if record["kind"] == "dense"}
            if dense:
                sys.exit(f"{preset}: not everything ran sparse: {dense}")
            density = sum(record["density"] for record in records) / len(records)
            state_of(self.pipe).switch.run.recorder = None  # recording costs a little
        times = []
        for _ in range(self.args.repeats):
            self.wait()
            start = time.perf_counter()
            self.forward()
            self.wait()
            times.append(time.perf_counter() - start)
        disable_psa(self.pipe)
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (statistics.median(times), density))
        return {
            "seconds": max(seconds for seconds, _ in gathered),
            "range": [min(times), max(times)],
            "density": [density for _, density in gathered],
            "out": out,
        }


def main(argv=None):
    args = parse(argv)
    if "RANK" not in os.environ:
        sys.exit("start it with torchrun --nproc_per_node=2 -m scripts.benchmarks.parallel")
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(args.device, local) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        with torch.no_grad():
            run(args, device)
    finally:
        dist.destroy_process_group()


def run(args, device):
    from psa_diffusers import load_preset
    from psa_diffusers.cli.generation import environment
    from psa_diffusers.processors.ulysses import HeadDealer

    shape, size, is_first = SHAPES[args.shape], dist.get_world_size(), dist.get_rank() == 0
    bench = Bench(args, shape, device)
    bench.pipe.transformer.set_attention_backend(args.backend)
    try:
        bench.forward()
    except RuntimeError as error:
        if is_first:
            print(f"the dense kernel {args.backend} does not run here ({error}): native in its place", flush=True)
        args.backend = "native"
        bench.pipe.transformer.set_attention_backend(args.backend)
    grid = tuple(n // patch for n, patch in zip(shape.latents, (1, 2, 2), strict=True))
    if is_first:
        print(f"{args.shape}, {args.layers} layers, grid {grid}, {args.dtype}, {size} x {device.type}", flush=True)
    cases = [("dense", None, True)]
    for preset in args.presets:
        cases.append((preset, preset, True))
        if HeadDealer.is_needed(load_preset(shape.section, preset), shape.heads, size):
            cases.append((f"{preset}, heads as they come", preset, False))
    alone = {title: bench.time_forward(preset) for title, preset, deals in cases if deals}
    parallelise(bench.pipe.transformer, device)
    lines = []
    for title, preset, deals in cases:
        one, several = alone[preset or "dense"], bench.time_forward(preset, deals)
        error = relative_error(several["out"], one["out"])
        if not error <= ROUNDING[args.dtype]:
            sys.exit(f"{title}: {size} processes differ from one by {error:.2e} (relative L1); nothing was timed")
        speedup = one["seconds"] / several["seconds"]
        lines.append(
            {
                "benchmark": "parallel",
                "shape": args.shape,
                "layers": args.layers,
                "heads": shape.heads,
                "grid": grid,
                "dtype": args.dtype,
                "dense_backend": args.backend,
                "attention": title,
                "gpus": size,
                "density": round(statistics.mean(several["density"]), 4),
                "density_by_process": [round(density, 4) for density in several["density"]],
                "one_s": round(one["seconds"], 4),
                "several_s": round(several["seconds"], 4),
                "several_s_range": [round(seconds, 4) for seconds in several["range"]],
                "speedup": round(speedup, 3),
                "efficiency": round(speedup / size, 3),
                "speedup_over_dense_on_one": round(alone["dense"]["seconds"] / several["seconds"], 3),
                "relative_l1_to_one": float(f"{error:.2e}"),
                **environment(str(device)),
            }
        )
        if is_first:
            line = lines[-1]
            print(
                f"{title:36} density {line['density']:.3f}  one {line['one_s']:8.4f} s  "
                f"{size}: {line['several_s']:8.4f} s  {speedup:5.2f}x, efficiency {line['efficiency']:.2f}",
                flush=True,
            )
    if is_first:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
