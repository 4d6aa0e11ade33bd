"""Time psa_attention against dense attention on this machine, side by side, on correlated inputs.

    python scripts/benchmark.py                                    CogVideoX-5B at 480p, one head (what a CPU can do)
    python scripts/benchmark.py --shape wan2.1-1.3b-480p --dtype bfloat16 --device cuda
    python scripts/benchmark.py --json docs/benchmarks/cpu.jsonl   append the result as one JSON line

The error against dense attention is computed first; where it is out of bounds, no time is printed. Dense and sparse
calls alternate, so that a machine that slows down slows both; planning (pyramid, importance, levels, schedule) is part
of the time. Memory is the growth of the process beyond what it held before the call, its result included.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from psa_diffusers import PSAPreset, psa_attention
from psa_diffusers.generation import environment

WORST_ERROR = 0.8  # relative L1; beyond it the answer is not attention any more


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
    "wan2.1-1.3b-720p": Shape(12, (18, 45, 80), 128),
    "wan2.1-14b-720p": Shape(40, (21, 45, 80), 128),
    "wan2.2-5b-704p": Shape(24, (31, 22, 40), 128),
}
PRESETS = {
    "published top-k": {1: [0, 0.1], 2: [0.1, 0.15], 8: [0.15, 0.35], 0: [0.35, 1]},
    "top-k .145 with text": {1: [0, 0.08], 2: [0.08, 0.12], 8: [0.12, 0.3], 0: [0.3, 1]},
    "full cover": {1: [0, 0.06], 2: [0.06, 0.1], 4: [0.1, 0.2], 8: [0.2, 0.3], 16: [0.3, 0.4], 32: [0.4, 1]},
}


def correlated(shape, heads, dtype, device, seed=3):
    """q, k, v ``[1, heads, L, D]``: a smooth field on the grid that queries and keys share, a direction common to all
    tokens, noise, and a 3-D rotary embedding; white noise would make the softmax flat. Text (white) stands in front.
    """
    draw = torch.Generator(device).manual_seed(seed)
    frames, height, width = shape.grid
    tokens, dim = frames * height * width, shape.head_dim

    def normal(*size):
        return torch.randn(*size, generator=draw, device=device)

    def smooth():
        knots = normal(heads, dim, max(frames // 3, 2), height // 4 + 1, width // 4 + 1)
        field = F.interpolate(knots, size=shape.grid, mode="trilinear", align_corners=True)
        return field.flatten(2).transpose(1, 2)[None]

    content = smooth() + 0.7 * normal(1, heads, 1, dim)
    q, k = (content + 0.3 * normal(1, heads, tokens, dim) for _ in range(2))
    v = smooth() + 0.5 * normal(1, heads, tokens, dim)
    place = torch.cartesian_prod(*(torch.arange(size, device=device) for size in shape.grid)).float()
    pairs = [dim // 8, 3 * dim // 16, 3 * dim // 16]
    angle = torch.cat(
        [place[:, axis, None] * 10000 ** -(torch.arange(n, device=device) / n) for axis, n in enumerate(pairs)], 1
    )
    rotation = torch.polar(torch.ones_like(angle), angle)

    def rotate(x):
        turned = torch.view_as_complex(x[..., : 2 * sum(pairs)].unflatten(-1, (-1, 2)).contiguous()) * rotation
        return torch.cat([torch.view_as_real(turned).flatten(-2), x[..., 2 * sum(pairs) :]], -1)

    q, k = rotate(q), rotate(k)
    if shape.text_tokens:
        q, k, v = (torch.cat([normal(1, heads, shape.text_tokens, dim), x], 2) for x in (q, k, v))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def timed(call, device):
    start = time.perf_counter()
    out = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def extra_memory(call, device):
    """Bytes that a call needs beyond what was held before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is held now
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name, shape, heads, preset_name, args):
    dtype = getattr(torch, args.dtype)
    q, k, v = correlated(shape, heads, dtype, args.device)
    preset = PSAPreset(mask_ratios=PRESETS[preset_name], name=preset_name)
    where = {"grid": shape.grid, "text_tokens": shape.text_tokens}

    def dense():
        return F.scaled_dot_product_attention(q, k, v)

    def sparse():
        return psa_attention(q, k, v, preset, **where)

    memory = extra_memory(sparse, args.device)
    out, schedule = psa_attention(q, k, v, preset, **where, return_schedule=True)
    truth = dense()
    error = float((out - truth).abs().float().sum() / truth.abs().float().sum())
    if not error <= WORST_ERROR:
        sys.exit(f"{name}, {preset_name}: relative error {error:.3f}; no time is reported for a wrong answer")
    pairs = [(timed(dense, args.device)[0], timed(sparse, args.device)[0]) for _ in range(args.repeats)]
    dense_seconds, sparse_seconds = (sorted(times) for times in zip(*pairs, strict=True))
    return {
        "shape": name,
        "batch": 1,
        "heads": heads,
        "tokens": q.shape[2],
        "head_dim": q.shape[3],
        "dtype": args.dtype,
        "preset": preset_name,
        "density": round(float(schedule.density()), 4),
        "relative_l1": round(error, 4),
        "dense_s": round(statistics.median(dense_seconds), 4),
        "dense_s_range": [round(dense_seconds[0], 4), round(dense_seconds[-1], 4)],
        "psa_s": round(statistics.median(sparse_seconds), 4),
        "psa_s_range": [round(sparse_seconds[0], 4), round(sparse_seconds[-1], 4)],
        "speedup": round(statistics.median(d / s for d, s in pairs), 2),
        "extra_memory_over_qkv": None if memory is None else round(memory / (3 * q.numel() * q.element_size()), 2),
        **environment(args.device),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cogvideox-5b-480p", help="shape that somebody runs")
    parser.add_argument("--heads", type=int, help="heads (default: 1 on a CPU, all on a GPU)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of a dense and a sparse call (default: 7)")
    parser.add_argument("--json", type=Path, help="file to append the results to, one JSON line each")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    heads = args.heads or (1 if args.device == "cpu" else shape.heads)
    print(f"{args.shape}: {heads} heads, {args.dtype} on {args.device}; times are medians, planning included")
    print(f"{'preset':24} density  error   dense s    PSA s  speedup  memory / (q+k+v)")
    with torch.no_grad():
        for preset_name in PRESETS:
            line = measure(args.shape, shape, heads, preset_name, args)
            print(
                f"{preset_name:24} {line['density']:7.3f} {line['relative_l1']:6.3f} {line['dense_s']:9.4f} "
                f"{line['psa_s']:8.4f} {line['speedup']:7.2f}x  {line['extra_memory_over_qkv']}",
                flush=True,
            )
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
