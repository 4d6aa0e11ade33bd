"""Time psa_attention against dense attention and its peers on this machine, in one process, on correlated inputs.

    python -m scripts.benchmarks.attention                     CogVideoX-5B at 480p, one head (what a CPU can do)
    python -m scripts.benchmarks.attention --shape all --json docs/benchmarks/gpu_h200.jsonl      on a GPU: every shape
    python -m scripts.benchmarks.attention --shape wan2.1-1.3b-720p --peers --psa_checkout ../psa
    python -m scripts.benchmarks.attention --plot docs/figures/speed.png --draw_from docs/benchmarks/gpu_h200.jsonl

A gate comes first: reading everything at full resolution must be dense attention, and each mix must agree with the
torch stages on some blocks of queries, both to rounding; for a wrong answer no time is printed. Times are medians of
calls of psa_attention, planning (pyramid, importance, levels, schedule) included. Density is what was executed, text
included; a mix whose density would be above --density reads fewer blocks finely. The error is the relative L1 error of
the output against dense attention on these inputs. Extra memory is what a call needs beyond q, k and v, its result
included. On a GPU a line also has the time of each stage alone, and the share of planning, which is everything up to
where attention can begin, timed within whole calls.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from psa_diffusers import psa_attention
from psa_diffusers.attention import resolve_backend
from psa_diffusers.cli.generation import environment
from psa_diffusers.ops import reference
from psa_diffusers.ops.layout import make_layout
from psa_diffusers.ops.types import LevelRule

from . import peers
from .fields import make_field
from .mixes import CPU_MIXES, GPU_MIXES, MIXES, fitted
from .timing import extra_memory, matrix_rate, pair_medians, relative_error, timed


@dataclass(frozen=True)
class Shape:
    """A shape that somebody runs."""

    heads: int
    grid: tuple[int, int, int]
    head_dim: int
    text_tokens: int = 0


SHAPES = {
    "cogvideox-5b-480p": Shape(48, (13, 30, 45), 64, 226),
    "cogvideox1.5-5b-768p": Shape(48, (11, 48, 85), 64, 226),
    "wan2.1-1.3b-480p": Shape(12, (21, 30, 52), 128),
    "wan2.1-1.3b-720p-69f": Shape(12, (18, 45, 80), 128),
    "wan2.1-1.3b-720p": Shape(12, (21, 45, 80), 128),
    "wan2.1-14b-720p": Shape(40, (21, 45, 80), 128),
    "wan2.2-5b-704p": Shape(24, (31, 22, 40), 128),
    "hunyuanvideo-720p": Shape(24, (33, 45, 80), 128, 256),
}
DISTINCT_HEADS = 4  # fields that are drawn; heads repeat them


def correlated(shape, heads, dtype, device):
    """q, k, v ``[1, heads, L, D]``, views as diffusers has them, of fields A, C, E and G; noise would be flat."""
    drawn = [
        make_field("ACEG"[head], shape.grid, shape.head_dim, text_tokens=shape.text_tokens, seed=100 + head)
        for head in range(min(heads, DISTINCT_HEADS))
    ]
    index = torch.arange(heads, device=device) % len(drawn)
    return tuple(
        torch.cat(parts, 1).to(device, dtype).transpose(1, 2)[:, :, index].contiguous().transpose(1, 2)
        for parts in zip(*drawn, strict=True)
    )


class StagedCall:
    """One preset on one shape: its stages and what they give."""

    def __init__(self, q, k, v, shape, preset):
        self.q, self.k, self.v, self.preset = q, k, v, preset
        self.where = {"grid": shape.grid, "text_tokens": shape.text_tokens}
        self.scale = q.shape[3] ** -0.5
        self.backend = reference
        if resolve_backend("auto", q) == "triton":
            from psa_diffusers.ops import triton as triton_backend

            self.backend = triton_backend
        self.layout = make_layout(
            shape.grid,
            shape.text_tokens,
            True,
            preset.block_m,
            preset.block_n,
            preset.order,
            preset.tile_size,
            q.device,
        )

    def run(self):
        return psa_attention(self.q, self.k, self.v, self.preset, **self.where)

    def pyramid(self):
        terms = {"key_variance": self.preset.key_variance, "value_tilt": self.preset.value_tilt}
        pyramid = self.backend.build_pyramid(self.k, self.v, self.layout, self.preset.factors, **terms)
        if self.preset.value_tilt and self.preset.tilt_gain == "sampled":
            pyramid = self.backend.fit_tilt(pyramid, self.q, self.k, self.v, self.layout, self.scale)
        return pyramid

    def importance(self, pyramid):
        return self.backend.block_importance(self.q, self.k, self.layout, self.preset.importance, self.scale, pyramid)

    def schedule(self, importance, pyramid):
        rule = LevelRule(self.preset.levels, self.preset.mask_mode, self.preset.min_full_ratio)
        return self.backend.plan_blocks(importance, self.layout, rule, self.preset.factors, finite=pyramid.finite)

    def attend(self, pyramid, schedule):
        return self.backend.attend(self.q, self.k, self.v, pyramid, schedule, self.layout, self.scale)

    def split(self, milliseconds):
        """Medians of planning and of a whole call, from the same calls; planning ends when attention can begin."""
        cache = torch.empty(2**26, dtype=torch.int32, device=self.q.device)  # cleared, as before any other figure
        marks = []
        while not marks or (len(marks) < 100 and marks[0][0].elapsed_time(marks[-1][2]) < milliseconds):
            for _ in range(5):
                mark = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                cache.zero_()
                mark[0].record()
                pyramid = self.pyramid()
                schedule = self.schedule(self.importance(pyramid), pyramid)
                if pyramid.ready is not None:
                    torch.cuda.current_stream().wait_event(pyramid.ready)
                mark[1].record()
                self.attend(pyramid, schedule)
                mark[2].record()
                marks.append(mark)
            torch.cuda.synchronize()
        return tuple(statistics.median(mark[0].elapsed_time(mark[i]) for mark in marks) for i in (1, 2))

    def check(self, out, schedule):
        """Hold some blocks of queries of the last head against the torch stages; stop where they differ."""
        q, k, v = (x[:, -1:] for x in (self.q, self.k, self.v))
        blocks = self.layout.num_query_blocks
        some = sorted({0, blocks // 2, blocks - 1})
        level_map = torch.zeros_like(schedule.to_level_map()[:, -1:])
        level_map[:, :, some] = schedule.to_level_map()[:, -1:, some]
        short = reference.make_schedule(level_map, self.preset.factors, self.preset.block_n)
        results = []
        for dtype in (q.dtype, torch.float32):
            inputs = [x.to(dtype) for x in (q, k, v)]
            pyramid = reference.build_pyramid(
                *inputs[1:], self.layout, self.preset.factors, key_variance=self.preset.key_variance,
                value_tilt=self.preset.value_tilt,
            )  # fmt: skip
            if self.preset.value_tilt and self.preset.tilt_gain == "sampled":
                pyramid = reference.fit_tilt(pyramid, *inputs, self.layout, self.scale)
            results.append(reference.attend(*inputs, pyramid, short, self.layout, self.scale))
        rows = torch.cat([self.layout.query_rows.view(blocks, -1)[i] for i in some]).long()
        rows = rows[rows >= 0]
        rounded, truth = (x[0, 0, rows].double() for x in results)
        largest = float(truth.abs().max())
        allowed = 2 * (float((rounded - truth).abs().max()) + torch.finfo(out.dtype).eps * largest)
        error = float((out[0, -1, rows].double() - truth).abs().max())
        if not error <= allowed:
            sys.exit(f"{self.preset.name}: differs from the torch stages by {error:.2e}, allowed {allowed:.2e}")


def time_shape(name, shape, q, k, v, args, rate, emit):
    """All lines of one shape."""
    device, dim, tokens, heads = args.device, q.shape[3], q.shape[2], q.shape[1]
    on_gpu = device.startswith("cuda")
    dense = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    if on_gpu:
        dense = peers.dense(q, k, v, "cudnn")
    truth = dense()
    full = StagedCall(q, k, v, shape, MIXES["all"].replace(name="all"))
    exact = F.scaled_dot_product_attention(*(x[:, -1:].float() for x in (q, k, v)))
    error, allowed = ((x[:, -1:] - exact).abs().max() for x in (full.run(), truth))
    if not error <= 2 * (allowed + torch.finfo(q.dtype).eps * exact.abs().max()):
        sys.exit(
            f"{name}: reading everything differs from dense attention by {error:.2e}, dense itself by {allowed:.2e}"
        )
    del exact
    work = 4 * heads * tokens**2 * dim
    base = {"shape": name, "batch": 1, "heads": heads, "tokens": tokens, "head_dim": dim, "dtype": args.dtype}
    base |= {"matrix_tflops": rate}
    dense_ms = None
    if on_gpu:
        dense_ms = timed(dense, device, args.milliseconds)
        line = {"provider": "dense cuDNN", "density": 1.0, "relative_l1": 0.0}
        emit(base | line | times(dense_ms, work, rate) | {"speedup": 1.0})
        flash = timed(peers.dense(q, k, v, "flash"), device, args.milliseconds)
        line |= {"provider": "dense FlashAttention-2"}
        emit(base | line | times(flash, work, rate) | {"speedup": round(dense_ms[0] / flash[0], 2)})

    mixes = args.mix or (GPU_MIXES if on_gpu else CPU_MIXES)
    timed_presets = set()
    for mix, density in [(mix, density) for mix in mixes for density in args.density]:
        preset = fitted(MIXES[mix], shape, density)
        if (mix, preset) in timed_presets:
            continue
        timed_presets.add((mix, preset))
        staged = StagedCall(q, k, v, shape, preset.replace(name=mix))
        pyramid = staged.pyramid()
        importance = staged.importance(pyramid)
        schedule = staged.schedule(importance, pyramid)
        out = staged.run()
        staged.check(out, schedule)
        executed = float(schedule.density())
        some = slice(0, DISTINCT_HEADS)
        both = pair_medians(dense, staged.run, device, args.milliseconds, dense_ms)
        line = {
            "provider": "psa_diffusers",
            "mix": mix,
            "density": round(executed, 4),
            "mask_ratios": preset.to_dict()["mask_ratios"],
            "blocks": [preset.block_m, preset.block_n],
            "relative_l1": round(relative_error(out[:, some], truth[:, some]), 4),
            **times(both[1], work * executed, rate),
            "dense_ms": round(both[0][0], 4),
            "speedup": round(both[0][0] / both[1][0], 2),
        }
        if on_gpu:
            parts = {
                "pyramid": timed(staged.pyramid, device, args.milliseconds)[0],
                "importance": timed(lambda: staged.importance(pyramid), device, args.milliseconds)[0],  # noqa: B023
                "schedule": timed(lambda: staged.schedule(importance, pyramid), device, args.milliseconds)[0],  # noqa: B023
                "attend": timed(lambda: staged.attend(pyramid, schedule), device, args.milliseconds)[0],  # noqa: B023
            }
            line["stage_ms"] = {key: round(value, 4) for key, value in parts.items()}
            line["attend_tflops"] = round(work * executed / parts["attend"] / 1e9, 1)
            line["attend_over_dense_rate"] = round(executed * dense_ms[0] / parts["attend"], 3)
            planning, whole = staged.split(args.milliseconds)
            line["planning_ms"], line["planning_share"] = round(planning, 4), round(planning / whole, 3)
        memory = extra_memory(staged.run, device)
        if memory is not None:
            line["extra_memory_over_qkv"] = round(memory / (3 * q.numel() * q.element_size()), 3)
        emit(base | line)
        if args.peers and on_gpu and mix == "cover" and density == args.density[0]:
            time_peers(base, q, k, v, staged, pyramid, truth, executed, dense_ms[0], work, rate, args, emit)


def time_peers(base, q, k, v, staged, pyramid, truth, density, dense_ms, work, rate, args, emit):
    """FlexAttention at the same density, and the repositories that were given, in the same process."""
    rows = staged.layout.key_rows
    ours, as_given = rows[rows >= 0].long(), slice(None)
    # each with the order in which the tokens of its result stand
    makers = {"FlexAttention": (lambda: peers.flex(q, k, v, density, lambda: staged.importance(pyramid), ours), ours)}
    if args.psa_checkout:
        makers["official PSA"] = (lambda: peers.official_psa(q, k, v, args.psa_checkout), as_given)
    if args.pisa_checkout:
        makers["PISA"] = (lambda: peers.pisa(q, k, v, density, args.pisa_checkout), as_given)
    some = slice(0, DISTINCT_HEADS)
    for name, (make, order) in makers.items():
        line = base | {"provider": name, "density": round(density, 4)}
        try:
            call = make()
            out = call()
            torch.cuda.synchronize()
            result = timed(call, args.device, args.milliseconds)
        except Exception as error:  # a peer that cannot run here is a line of the table, not the end of it
            emit(line | {"problem": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"})
            continue
        line |= {"relative_l1": round(relative_error(out[:, some], truth[:, some][:, :, order]), 4)}
        emit(line | times(result, work * density, rate) | {"speedup": round(dense_ms / result[0], 2)})


def times(result, work, rate):
    tflops = work / result[0] / 1e9
    line = {"ms": round(result[0], 4), "ms_p20_p80": [round(x, 4) for x in result[1:]], "tflops": round(tflops, 1)}
    return line if rate is None else line | {"share_of_matrix_rate": round(tflops / rate, 3)}


def show(line):
    if "problem" in line:
        print(f"  {line['provider']:24} {line['problem']}", flush=True)
        return
    name = line.get("mix", line["provider"])
    text = (
        f"  {name:24} {line['density']:.3f}  {line['relative_l1']:.4f}  {line['ms']:9.3f} ms  {line['speedup']:5.2f}x"
    )
    if "stage_ms" in line:
        stage = " ".join(f"{key} {value:.3f}" for key, value in line["stage_ms"].items())
        text += f"  {stage}  {line['attend_tflops']:.0f} TF ({line['attend_over_dense_rate']:.2f} of dense)"
    if "extra_memory_over_qkv" in line:
        text += f"  memory {line['extra_memory_over_qkv']:.2f}"
    print(text, flush=True)


def draw(lines, path):
    """Speed over dense attention against density on every shape, and what density alone would make of it."""
    from matplotlib.figure import Figure

    # what was measured last counts
    lines = {(line["shape"], _label(line), round(line["density"], 3)): line for line in lines if "speedup" in line}
    lines = [line for line in lines.values() if line["density"] < 1]
    if not lines:
        sys.exit(f"{path}: nothing sparse to draw")
    labels = list(dict.fromkeys(map(_label, sorted(lines, key=lambda line: line["provider"] != "psa_diffusers"))))
    shapes = list(dict.fromkeys(line["shape"] for line in lines))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    densities = [line["density"] for line in lines]
    span = torch.linspace(0.9 * min(densities), 1.05 * max(densities), 50)
    shown = {}
    for axis, name in zip(axes, shapes, strict=False):
        (shown["1 / density"],) = axis.plot(span, 1 / span, color="0.6", linewidth=1)
        shown["dense"] = axis.axhline(1, color="0.6", linewidth=1, linestyle="--")
        for number, label in enumerate(labels):
            here = [line for line in lines if line["shape"] == name and _label(line) == label]
            if here:
                points = sorted((line["density"], line["speedup"]) for line in here)
                style = "o-" if here[0]["provider"] == "psa_diffusers" else "s"
                (shown[label],) = axis.plot(*zip(*points, strict=True), style, color=f"C{number}", markersize=5)
        axis.set_title(name, fontsize="medium")
        axis.set(xlabel="density", ylabel="speed over dense", ylim=(0, 1.15 * max(line["speedup"] for line in lines)))
        axis.tick_params(labelbottom=True, labelleft=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(shapes) :]:
        axis.remove()
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=100)


def _label(line):
    ours = line["provider"] == "psa_diffusers"
    return f"psa_diffusers, {line['mix']}" if ours else line["provider"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES, "all"], default=["cogvideox-5b-480p"])
    parser.add_argument("--mix", nargs="+", choices=MIXES, help="level choices (default: six on a GPU, three on a CPU)")
    parser.add_argument("--density", nargs="+", type=float, default=[0.15], help="upper bounds (default: 0.15)")
    parser.add_argument("--heads", type=int, help="heads (default: 1 on a CPU, all on a GPU)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, bfloat16 on a GPU"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--milliseconds", type=int, default=100, help="GPU time spent on a figure (default: 100)")
    parser.add_argument("--peers", action="store_true", help="time FlexAttention and the checkouts, too")
    parser.add_argument("--psa_checkout", type=Path, help="folder of the official PSA repository")
    parser.add_argument("--pisa_checkout", type=Path, help="folder of the PISA repository")
    parser.add_argument("--json", type=Path, help="file to append the results to, one JSON line each")
    parser.add_argument("--plot", type=Path, help="picture of run time against density, from the file of --json")
    parser.add_argument("--draw_from", nargs="+", type=Path, metavar="FILE", help="measure nothing, draw what is there")
    args = parser.parse_args()
    if args.draw_from and not args.plot:
        parser.error("--draw_from needs --plot, the file to draw into")
    if args.plot and not (args.draw_from or args.json):
        parser.error("--plot needs --json or --draw_from, the files with what was measured")
    if not args.draw_from:
        run(args)
    if args.plot:
        files = args.draw_from or [args.json]
        draw([json.loads(line) for file in files for line in file.read_text().splitlines()], args.plot)


def run(args):
    on_gpu = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    facts, rate = environment(args.device), matrix_rate(args.device)

    def emit(line):
        show(line)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with args.json.open("a") as file:
                file.write(json.dumps(line | facts) + "\n")

    for name in SHAPES if "all" in args.shape else args.shape:
        shape = SHAPES[name]
        heads = args.heads or (shape.heads if on_gpu else 1)
        print(
            f"{name}: {heads} heads, {args.dtype} on {args.device}: density, error, time, speed-up, stages", flush=True
        )
        with torch.no_grad():
            q, k, v = correlated(shape, heads, getattr(torch, args.dtype), args.device)
            time_shape(name, shape, q, k, v, args, rate, emit)


if __name__ == "__main__":
    main()
