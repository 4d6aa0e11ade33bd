"""Compare choices of levels: error of the attention output against its density, beside dense attention and the peers.

    python -m scripts.benchmarks.levels                           synthetic fields, about 3 minutes on two cores
    python -m scripts.benchmarks.levels --qkv docs/data/trained_head.safetensors
    python -m scripts.benchmarks.levels --qkv recorded.safetensors --grid 13 30 45 --text_tokens 226
    python -m scripts.benchmarks.levels --presets psa_fast psa_cover --config my_presets.yaml
    python -m scripts.benchmarks.levels --record demo             heads of a running pipeline, recorded first
    python -m scripts.benchmarks.levels --suite heldout           96 cases kept apart from tuning, longer
    python -m scripts.benchmarks.levels --suite acceptance --qkv FILE   what our presets must hold, with bounds
    python -m scripts.benchmarks.levels --json heads.jsonl --json_table table.jsonl --plot levels.png

Every method runs through the stages of psa_attention. Rows of the table: the presets; the rule of psa_cover at other
densities ("this project"); the published choice (its ratios, blocks of 128, Gilbert order, largest score of random
positions that all blocks share); exact top blocks with one mean for each other block, without (zeroth order) and with
the value tilt (first order); and exact top blocks alone, the others dropped. The error is that of video queries, in a
sample of the query blocks: dense attention is computed for the sampled rows only, so the figures are exact for those.
Ratios are to the published choice, head by head.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from psa_diffusers import PSAPreset, record_qkv
from psa_diffusers.cli.generation import call_defaults, generate
from psa_diffusers.cli.opening import add_call_options, open_model, read_prompts
from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.reference import (
    assign_block_levels,
    attend,
    block_importance,
    build_pyramid,
    fit_tilt,
    make_schedule,
)
from psa_diffusers.ops.types import LevelRule, Pyramid

from .acceptance import show_acceptance
from .fields import FIELDS
from .heads import Head, Truth, dense_truth, field_heads, lay_out, published_importance, recorded_heads
from .methods import Method, acceptance_methods, choose_methods, label

DENSITIES = (0.05, 0.07, 0.10, 0.15, 0.20)
TUNING_SEED, HELDOUT_SEED = 0, 1000


def record(args, path: Path) -> None:
    """Run a pipeline dense and write q, k, v of its self-attentions in a few steps to a file."""
    pipe, call = open_model(args.record, args)
    count = (call_defaults(pipe, ["num_inference_steps"]) | call)["num_inference_steps"]
    steps = args.record_steps or f"{count // 4},{count // 2},{count - 1}"
    with record_qkv(pipe, path, steps=steps, layers=args.record_layers, heads=args.record_heads) as recording:
        for number, prompt in enumerate(read_prompts(args, args.record)[: args.record_prompts]):
            generate(pipe, {**call, "prompt": prompt, "output_type": "latent"}, seed=args.seed + number)
    print(f"{len(recording.records)} calls of self-attentions recorded, steps {steps} of {count}")


def run_method(head: Head, method: Method, truths: dict, pyramids: dict, sampled_queries: int) -> dict:
    """Error, density and shares of one method on one head."""
    preset = method.preset.for_video(math.prod(head.grid))
    layout = lay_out(head, preset)
    if layout not in truths:
        truths[layout] = dense_truth(head, layout, sampled_queries)
    truth = truths[layout]
    if preset.type == "dense":
        return errors_of(truth.out, truth, density=1.0, shares={1: 1.0})
    scale = head.scale
    pyramid = pyramid_of(head, preset, layout, pyramids)
    key = (layout, preset.importance, method.published_estimator)
    if key not in pyramids:
        pyramids[key] = (
            published_importance(head, layout, scale)
            if method.published_estimator
            else block_importance(head.q, head.k, layout, preset.importance, scale)
        )
    rule = LevelRule(preset.levels, preset.mask_mode, preset.min_full_ratio)
    level_map = assign_block_levels(pyramids[key], layout, rule)
    density = make_schedule(level_map[:, :, : layout.video_query_blocks], preset.factors, preset.block_n).density()
    sampled = torch.zeros_like(level_map)
    sampled[:, :, truth.blocks] = level_map[:, :, truth.blocks]
    out = attend(
        head.q,
        head.k,
        head.v,
        pyramid,
        make_schedule(sampled, preset.factors, preset.block_n),
        layout,
        scale=scale,
    )[0, 0, truth.rows]
    levels = level_map[0, 0, truth.blocks]
    shares = {factor: float((truth.mass * (levels == factor)).sum(1).mean()) for factor in (*preset.factors, 0)}
    return errors_of(out, truth, density=float(density), shares=shares)


def pyramid_of(head: Head, preset: PSAPreset, layout: Layout, made: dict) -> Pyramid:
    """The pyramid of a preset, made once for all methods that share it."""
    terms = {"key_variance": preset.key_variance, "value_tilt": preset.value_tilt}
    key = (layout, preset.factors, *terms.values(), preset.tilt_gain)
    if key not in made:
        made[key] = build_pyramid(head.k, head.v, layout, preset.factors, **terms)
        if preset.value_tilt and preset.tilt_gain == "sampled":
            made[key] = fit_tilt(made[key], head.q, head.k, head.v, layout, head.scale)
    return made[key]


def errors_of(out: Tensor, truth: Truth, *, density: float, shares: dict[int, float]) -> dict:
    """Errors against dense attention over the sampled rows; worst 1 %: mean of the worst rows, at least one."""
    gap, size = out - truth.out, truth.out
    l1, l2 = gap.abs().sum(1), gap.norm(dim=1)
    worst = max(1, round(len(gap) / 100))
    row_l1, row_l2 = l1 / size.abs().sum(1).clamp_min(1e-12), l2 / size.norm(dim=1).clamp_min(1e-12)
    cosine = torch.cosine_similarity(out, size, dim=1)
    return {
        "density": density,
        "relative_l1": float(l1.sum() / size.abs().sum()),
        "relative_l1_worst1": float(row_l1.topk(worst).values.mean()),
        "relative_l2": float(gap.norm() / size.norm()),
        "relative_l2_worst1": float(row_l2.topk(worst).values.mean()),
        "cosine": float(cosine.mean()),
        "cosine_worst1": float(cosine.topk(worst, largest=False).values.mean()),
        "mass_by_factor": {str(factor): round(share, 4) for factor, share in shares.items() if share > 0},
    }


def summarise(lines: list[dict]) -> list[dict]:
    """One row a method: means and worst heads, and ratios to the published choice at its own density."""
    by_method = defaultdict(dict)
    for line in lines:
        by_method[line["method"]][line["case"]] = line
    published = by_method[label("published", 0.15)]
    table = []
    for method, heads in by_method.items():
        errors = torch.tensor([line["relative_l1"] for line in heads.values()])
        row = {"method": method, "line": next(iter(heads.values()))["line"], "heads": len(heads)}
        for key in ("density", "relative_l1", "relative_l2", "relative_l2_worst1", "cosine", "cosine_worst1"):
            row[key] = sum(line[key] for line in heads.values()) / len(heads)
        row["worst_head"] = float(errors.max())
        if published:
            known = torch.tensor([published[head]["relative_l1"] for head in heads])
            ratio = errors / known.clamp_min(1e-12)
            row |= {
                "ratio_of_means": float(errors.mean() / known.mean()),
                "mean_ratio": float(ratio.mean()),
                "max_ratio": float(ratio.max()),
                "worst_head_ratio": float(errors.max() / known.max()),
            }
        shares = defaultdict(float)
        for line in heads.values():
            for factor, share in line["mass_by_factor"].items():
                shares[factor] += share / len(heads)
        row["mass_by_factor"] = {factor: round(share, 3) for factor, share in sorted(shares.items(), key=_by_factor)}
        table.append(row)
    return sorted(table, key=lambda row: (row["line"], -row["density"], row["method"]))


def _by_factor(item: tuple[str, float]) -> float:
    return int(item[0]) or math.inf


def write_lines(lines: list[dict], path: Path) -> None:
    """One JSON line each, with four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(_rounded(line)) + "\n" for line in lines), encoding="utf-8")


def _rounded(line: dict) -> dict:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()}


def show(table: list[dict]) -> None:
    width = max(len(row["method"]) for row in table)
    ratios = "ratio_of_means" in table[0]
    print(
        f"{'':{width}}          relative L1    rel. L2            cosine         "
        + ("ratio of L1 to published   " if ratios else "")
    )
    print(
        f"{'method':{width}}  density  mean  worst   mean  w.1%    mean    w.1%  "
        + ("of means  mean   max  worst  " if ratios else "")
        + "attention mass by factor"
    )
    for row in table:
        shares = row["mass_by_factor"].items()
        mass = " ".join(f"{'skip' if factor == '0' else factor}:{share:.2f}" for factor, share in shares)
        middle = (
            "    {ratio_of_means:6.3f} {mean_ratio:5.2f} {max_ratio:5.2f}  {worst_head_ratio:5.2f}  ".format(**row)
            if ratios
            else ""
        )
        print(
            f"{row['method']:{width}}    {row['density']:.3f} {row['relative_l1']:5.3f}  {row['worst_head']:5.3f} "
            f" {row['relative_l2']:5.3f} {row['relative_l2_worst1']:5.2f}  {row['cosine']:6.4f} "
            f"{row['cosine_worst1']:7.3f} " + middle + mass
        )


def draw(table: list[dict], path: Path) -> None:
    """Error against density: one line a method that has several densities, a mark for a preset."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    by_line = defaultdict(list)
    for row in table:
        if row["line"] != "dense":
            by_line[row["line"]].append((row["density"], row["relative_l1"]))
    for line, points in by_line.items():
        ours = {"color": "black", "linewidth": 2.5} if line == "this project" else {"linewidth": 1.2}
        mark = {"marker": "o", "markersize": 4} if len(points) > 1 else {"marker": "*", "markersize": 13}
        axis.plot(*zip(*sorted(points), strict=True), label=line, **ours, **mark)
    axis.set(
        xlabel="density (share of the dense work)",
        ylabel="relative L1 error of the attention output",
        title=f"Error against density, mean over {table[0]['heads']} heads",
        yscale="log",
    )
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(which="both", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("methods")
    what.add_argument("--presets", nargs="+", metavar="NAME", help="presets to judge (default: all sparse ones)")
    what.add_argument("--model", default="default", help="section of the preset file (default: default)")
    what.add_argument("--config", type=Path, help="YAML with presets of your own, laid over the built-in file")
    what.add_argument(
        "--densities", nargs="+", type=float, default=DENSITIES, help="densities of the baselines; .15 is always there"
    )
    what.add_argument(
        "--baseline_order",
        choices=("Gilbert", "boxes"),
        default="Gilbert",
        help="token order of the baselines with exact top blocks (default: Gilbert)",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--qkv", type=Path, help="safetensors file of recorded heads, in place of the fields")
    data.add_argument(
        "--record",
        metavar="MODEL",
        help="entry of configs/models.yaml, hub id or folder: run it dense and judge its heads; --qkv keeps them",
    )
    data.add_argument("--grid", nargs=3, type=int, metavar=("F", "H", "W"), help="its grid, if the file does not say")
    data.add_argument("--text_tokens", type=int, help="its text tokens, if the file does not say")
    data.add_argument(
        "--part", choices=("even", "odd"), help="only every other recorded head: tune on one, judge on the other"
    )
    data.add_argument(
        "--suite",
        choices=("quick", "tuning", "heldout", "acceptance"),
        default="quick",
        help="which fields: quick, A-L at 13x30x45; tuning and heldout, A-H at three grids, D 64 and 128, with and "
        "without text, each with seeds of its own; acceptance: the bounds of our presets on the heldout fields, on "
        "I-L, and on the recorded heads of --qkv",
    )
    data.add_argument("--fields", nargs="+", choices=FIELDS, metavar="FIELD", help="only these fields")
    data.add_argument("--field_grid", nargs=3, type=int, metavar=("F", "H", "W"), help="grid in place of the suite's")
    data.add_argument("--field_seed", type=int, help="seed in place of the suite's")
    data.add_argument("--queries", type=int, default=1024, help="queries sampled a head (default: 1024)")
    call = parser.add_argument_group("with --record")
    add_call_options(call)
    call.add_argument("--record_steps", metavar="RANGE", help="denoising steps (default: three, the last among them)")
    call.add_argument("--record_layers", metavar="RANGE", help="self-attentions of a denoiser (default: all)")
    call.add_argument("--record_heads", metavar="RANGE", help="heads of each (default: all)")
    call.add_argument("--record_prompts", type=int, default=1, metavar="N", help="prompts to run (default: 1)")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, help="write one JSON line a head and method here")
    out.add_argument("--json_table", type=Path, help="write the rows of the table here, one JSON line a method")
    out.add_argument("--plot", type=Path, help="picture of error against density")
    out.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    args = parser.parse_args(argv)
    args.densities = sorted({*args.densities, 0.15})
    if not all(0.02 <= density < 1 for density in args.densities):
        parser.error("--densities must lie between 0.02 and 1")
    if args.suite == "acceptance" and (args.plot or args.json_table):
        parser.error("--plot and --json_table show several densities; the acceptance suite has one for each preset")
    quick = args.suite == "quick"
    every = args.suite in ("quick", "acceptance")
    args.fields = args.fields or (tuple(FIELDS) if every else tuple("ABCDEFGH"))
    grids = [(13, 30, 45)] if quick else [(13, 30, 45), (11, 29, 31), (7, 19, 23)]
    args.grids = [tuple(args.field_grid)] if args.field_grid else grids
    args.dims, args.text = ((64,), (0,)) if quick else ((64, 128), (0, 226))
    seed = HELDOUT_SEED if args.suite in ("heldout", "acceptance") else TUNING_SEED
    args.seeds = (seed if args.field_seed is None else args.field_seed,)
    return args


def evaluate(heads, methods: list[Method], queries: int, total: int | None = None, group: str = "") -> list[dict]:
    """One dict a head and method."""
    lines = []
    for head in tqdm(heads, total=total, unit="head", desc=group or None, disable=None):
        truths, made = {}, {}
        for method in methods:
            result = run_method(head, method, truths, made, queries)
            lines.append({"group": group, "case": head.name, "method": method.name, "line": method.line, **result})
    return lines


def accept(args) -> list[dict]:
    """The lines of the acceptance suite: recorded heads, if there are any, fields A to H, and those of other kinds."""
    methods = acceptance_methods(args)
    lines = evaluate(recorded_heads(args), methods, 4 * args.queries, group="recorded") if args.qkv else []
    shapes = len(args.grids) * len(args.dims) * len(args.text)
    for group, fields in (("fields", "ABCDEFGH"), ("other", "IJKL")):
        chosen = argparse.Namespace(**{**vars(args), "fields": [field for field in fields if field in args.fields]})
        if chosen.fields:
            lines += evaluate(field_heads(chosen), methods, args.queries, shapes * len(chosen.fields), group)
    return lines


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if args.record:
            args.qkv = args.qkv or Path(folder) / "qkv.safetensors"
            record(args, args.qkv)
        if args.suite == "acceptance":
            lines = accept(args)
        elif args.qkv:
            lines = evaluate(recorded_heads(args), choose_methods(args), args.queries)
        else:
            total = len(args.grids) * len(args.dims) * len(args.text) * len(args.seeds) * len(args.fields)
            lines = evaluate(field_heads(args), choose_methods(args), args.queries, total)
    if args.json:
        write_lines(lines, args.json)
    if args.suite == "acceptance":
        sys.exit(0 if show_acceptance(lines) else 1)
    table = summarise(lines)
    show(table)
    if args.json_table:
        write_lines(table, args.json_table)
    if args.plot:
        draw(table, args.plot)


if __name__ == "__main__":
    main()
