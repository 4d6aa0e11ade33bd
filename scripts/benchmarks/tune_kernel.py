"""Measure launches of the Triton kernels on this GPU, for the table in psa_diffusers/ops/triton/tuning.py.

    python -m scripts.benchmarks.tune_kernel                                  every kernel, head dimensions 64 and 128
    python -m scripts.benchmarks.tune_kernel --kernel importance covariance --head_dim 128 --json tuning.jsonl

Nothing is tuned while a user waits: a row of the table is what won here, and the line with its times is the reason.
Candidates are compiled by several processes first, then timed one after the other. One that gives another result than
the row of the table is left out, and so is one that does not fit the chip; both are listed.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import sys
from pathlib import Path

import torch

from psa_diffusers import PSAPreset
from psa_diffusers.cli.generation import environment
from psa_diffusers.ops import triton as triton_backend
from psa_diffusers.ops.layout import make_layout
from psa_diffusers.ops.triton import tuning

from .mixes import COVER

TUNED_SHAPES = {64: (48, (13, 30, 45), 226), 128: (12, (18, 45, 80), 0)}  # CogVideoX-5B at 480p, Wan 2.1 1.3B at 720p
TABLES = {
    "pyramid": (tuning.PYRAMID, {"span": (8, 16), "channels": (8, 16), "registers": (None, 128, 112, 96)}),
    "covariance": (
        tuning.COVARIANCE,
        {
            "pairs": (16, 32, 64),
            "cells": (32, 64, 128),
            "columns": (64, 128),
            "num_warps": (4, 8),
            "num_stages": (1, 2, 3),
        },
    ),
    "importance": (
        tuning.IMPORTANCE,
        {"rows": (64, 128), "columns": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    ),
}


def candidates(kernel):
    """Every row worth trying, the one of the table first."""
    table, choices = TABLES[kernel]
    kind = type(next(iter(table.values())))
    return [kind(*values) for values in itertools.product(*choices.values())]


def prepare(kernel, head_dim, dtype):
    """A call of the kernel at a real shape."""
    heads, grid, text = TUNED_SHAPES[head_dim]
    tokens = math.prod(grid) + text
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)
        for _ in range(3)
    )
    # pairs of cells, and wider steps
    factors = (1, 2, 4, 16, 64) if kernel == "covariance" else PSAPreset(mask_ratios=COVER).factors
    layout = make_layout(grid, text, True, 128, 128, "gilbert", (2, 8, 8), q.device)
    if kernel == "importance":
        return lambda: triton_backend.block_importance(q, k, layout, "pooled_moments", head_dim**-0.5)
    tilt = kernel == "covariance"
    return lambda: triton_backend.build_pyramid(k, v, layout, factors, key_variance=True, value_tilt=tilt)


def result(kernel, out):
    if kernel == "importance":
        return out
    return out.covariance if kernel == "covariance" else out.keys


def place_of(head_dim):
    """Where the row of this chip stands in a table."""
    return tuning.matrix_unit(torch.device("cuda", torch.cuda.current_device())), head_dim


def restore(table, place, row):
    if row is None:
        table.pop(place, None)
    else:
        table[place] = row


def attempt(kernel, head_dim, dtype, row, call):
    """Run with this row in the table; the result, or why there is none."""
    table, place = TABLES[kernel][0], place_of(head_dim)
    before = table.get(place)
    table[place] = row
    try:
        out = result(kernel, call())
        torch.cuda.synchronize()
        return out, None
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    finally:
        restore(table, place, before)


def compile_some(jobs):
    """In a process of its own: fill Triton's cache."""
    for kernel, head_dim, dtype, rows in jobs:
        call = prepare(kernel, head_dim, getattr(torch, dtype))
        for row in rows:
            attempt(kernel, head_dim, dtype, row, call)


def measure(kernel, head_dim, dtype_name):
    from triton.testing import do_bench

    dtype = getattr(torch, dtype_name)
    call = prepare(kernel, head_dim, dtype)
    table, place = TABLES[kernel][0], place_of(head_dim)
    before = table.get(place)
    now = before or table["", head_dim]
    truth = result(kernel, call())
    lines = []
    for row in dict.fromkeys([now, *candidates(kernel)]):
        out, problem = attempt(kernel, head_dim, dtype, row, call)
        milliseconds = None
        if problem is None and not torch.allclose(out.float(), truth.float(), rtol=2e-2, atol=1e-3 * truth.abs().max()):
            problem = "another result"
        if problem is None:
            table[place] = row
            milliseconds = round(do_bench(call, warmup=5, rep=25, return_mode="median"), 4)
            restore(table, place, before)
        lines.append({"row": dataclasses.asdict(row), "ms": milliseconds, "problem": problem, "is_table": row == now})
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--head_dim", nargs="+", type=int, choices=TUNED_SHAPES, default=list(TUNED_SHAPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile (default: 12)")
    parser.add_argument("--json", type=Path, help="file to append to, one line a kernel and head dimension")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_kernel needs a GPU: the rows of the table are times on a chip")
    work = [
        (kernel, dim, args.dtype, [row])
        for kernel in args.kernel
        for dim in args.head_dim
        for row in candidates(kernel)
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(compile_some, [work[i :: args.jobs] for i in range(args.jobs)])
    for kernel in args.kernel:
        for head_dim in args.head_dim:
            lines = measure(kernel, head_dim, args.dtype)
            print(f"{kernel}, head dimension {head_dim}, {args.dtype}")
            ranked = sorted((line for line in lines if line["ms"] is not None), key=lambda line: line["ms"])
            for line in [*ranked[:4], *(line for line in ranked[4:] if line["is_table"])]:
                print(f"  {line['ms']:.4f} ms  {line['row']}{'  <- table' if line['is_table'] else ''}", flush=True)
            print(f"  {len(lines) - len(ranked)} of {len(lines)} left out", flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                entry = {"kernel": kernel, "head_dim": head_dim, "dtype": args.dtype, "candidates": lines}
                with args.json.open("a") as file:
                    file.write(json.dumps({**entry, **environment("cuda")}) + "\n")


if __name__ == "__main__":
    main()
