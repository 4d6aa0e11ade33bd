"""Time psa_attention against dense attention on this machine, side by side, on correlated inputs.

    python scripts/benchmark.py                                    CogVideoX-5B at 480p, one head (what a CPU can do)
    python scripts/benchmark.py --shape wan2.1-1.3b-480p --dtype bfloat16 --device cuda
    python scripts/benchmark.py --json docs/benchmarks/cpu.jsonl   append the result as one JSON line

First the operation has to give dense attention when it reads everything at full resolution; otherwise no time is
printed. Dense and sparse calls alternate, so that a machine that slows down slows both; planning (pyramid, importance, levels, schedule) is part
of the time. Memory is the growth of the process beyond what it held before the call, its result included.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _fields import make_field

from psa_diffusers import PSAPreset, psa_attention
from psa_diffusers.generation import environment

ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # relative L1 of two ways to round dense attention


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


def correlated(shape, heads, dtype, device):
    """q, k, v ``[1, heads, L, D]`` of field A, one seed a head; white noise would make the softmax flat."""
    drawn = [
        make_field("A", shape.grid, shape.head_dim, text_tokens=shape.text_tokens, seed=head) for head in range(heads)
    ]
    return tuple(torch.cat(parts, 1).to(device, dtype) for parts in zip(*drawn, strict=True))


def relative_error(out, truth):
    return float((out - truth).abs().float().sum() / truth.abs().float().sum())


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
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed but kept would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is held now
    except (OSError, AttributeError):
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

    truth = dense()
    full = psa_attention(q, k, v, preset.replace(mask_ratios={1: [0, 1]}), **where)
    if not relative_error(full, truth) <= ROUNDING[args.dtype]:
        sys.exit(f"{name}: reading everything differs from dense attention by {relative_error(full, truth):.2e}")
    sparse()
    memory = extra_memory(sparse, args.device)
    out, schedule = psa_attention(q, k, v, preset, **where, return_schedule=True)
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
        "relative_l1": round(relative_error(out, truth), 4),
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
