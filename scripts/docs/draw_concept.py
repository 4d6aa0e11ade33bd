"""Draw the figures of docs/developer/concept.md, one a stage, from the recorded head in docs/data.

python -m scripts.docs.draw_concept [--output docs/figures]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from safetensors.torch import load_file

from psa_diffusers import PSAPreset, psa_attention
from psa_diffusers.ops.layout import make_layout
from psa_diffusers.ops.orders import video_order
from psa_diffusers.ops.reference import block_importance, build_pyramid

from ..benchmarks.mixes import COVER, PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
GRID = (12, 16, 16)
SCALE = 64**-0.5
PUBLISHED_PRESET = PSAPreset(mask_ratios=PUBLISHED)
COVER_PRESET = PSAPreset(
    mask_ratios=COVER,
    rearrange_method="boxes",
    key_variance=True,
    value_tilt=True,
)


def draw_order(save):
    """Stage 2: which block each token of a frame belongs to, in three orders."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for axis, order in zip(axes, ("raster", "gilbert", "boxes"), strict=True):
        block = torch.empty(3072, dtype=torch.long)
        block[video_order(GRID, order)] = torch.arange(3072) // 128
        axis.imshow(block.view(GRID)[0], cmap="tab20", interpolation="nearest")
        tokens = video_order(GRID, order)[:128]
        extent = torch.stack([tokens // 256, tokens // 16 % 16, tokens % 16], 1)
        size = (extent.amax(0) - extent.amin(0) + 1).tolist()
        axis.set(
            title=f"{order}: first block spans\n{size[0]} frames, {size[1]} rows, {size[2]} columns",
            xticks=[],
            yticks=[],
        )
    save(figure, "2_layout")


def draw_pyramid(k, v, save):
    """Stage 3: the keys of one block at each factor."""
    layout = make_layout(GRID, 0, True, 128, 128, "boxes", (2, 8, 8), k.device)
    factors = (1, 2, 4, 8, 16, 32, 64, 128)
    pyramid = build_pyramid(k, v, layout, factors)
    figure, axes = plt.subplots(
        1, len(factors), figsize=(10, 2.8), width_ratios=[2, *[1] * (len(factors) - 1)], layout="constrained"
    )
    for axis, factor, base in zip(axes, factors, pyramid.bases, strict=True):
        cells = 128 // factor
        keys = k[0, 0, layout.key_rows[:128].long()] if factor == 1 else pyramid.keys[0, 0, base : base + cells]
        axis.imshow(keys.T, aspect="auto", cmap="RdBu", vmin=-2, vmax=2, interpolation="nearest")
        axis.set(title=f"{factor}: {cells} keys" if factor == 1 else f"{factor}: {cells}", xticks=[], yticks=[])
    axes[0].set_ylabel("channel")
    figure.suptitle("one key block at factors 1 to 128")
    save(figure, "3_pyramid")


def draw_importance(q, k, save):
    """Stage 4: the estimate beside the attention mass that it estimates."""
    layout = make_layout(GRID, 0, True, 128, 128, "gilbert", (2, 8, 8), k.device)
    rows = layout.query_rows.long()
    mass = (q[0, 0, rows] @ k[0, 0, rows].T * SCALE).softmax(-1).view(24, 128, 24, 128).sum(3).mean(1)
    estimate = block_importance(q, k, layout, "pooled_mass", SCALE)[0, 0]
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.4), layout="constrained")
    for axis, values, title in zip(
        axes, (mass, estimate), ("attention mass of each block pair", "its estimate (pooled_mass)"), strict=True
    ):
        image = axis.imshow(values.clamp_min(1e-4), norm=LogNorm(1e-3, 1), cmap="magma")
        axis.set(title=title, xlabel="key block", ylabel="query block")
    figure.colorbar(image, ax=axes, shrink=0.8)
    save(figure, "4_importance")


def draw_levels(schedules, save):
    """Stage 5: the level maps of two presets."""
    factors = [0, 1, 2, 4, 8, 16, 32]
    colours = ListedColormap(["#ffffff", *plt.get_cmap("viridis")(np.linspace(0, 0.95, len(factors) - 1))])
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for axis, (name, schedule) in zip(axes, schedules.items(), strict=True):
        index = torch.searchsorted(torch.tensor(factors), schedule.to_level_map()[0, 0].long())
        image = axis.imshow(index, cmap=colours, norm=BoundaryNorm(np.arange(-0.5, len(factors)), len(factors)))
        axis.set(title=f"{name}: density {schedule.density():.3f}", xlabel="key block", ylabel="query block")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=range(len(factors)))
    bar.ax.set_yticklabels(["skip", *map(str, factors[1:])])
    save(figure, "5_levels")


def draw_schedule(schedule, save):
    """Stage 6: what six query blocks read, in the order in which they read it."""
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(schedule.factors)))
    for row in range(6):
        left = 0
        offsets = schedule.offsets[0, 0, row].tolist()
        for f, factor in enumerate(schedule.factors):
            for block in schedule.block_ids[0, 0, row, offsets[f] : offsets[f + 1]].tolist():
                width = 128 / factor
                axis.barh(row, width, left=left, color=colours[f], edgecolor="white", linewidth=0.6)
                if width >= 16:
                    axis.text(left + width / 2, row, block, ha="center", va="center", fontsize=6, color="white")
                left += width
    axis.set(yticks=range(6), ylabel="query block", xlabel="keys read, pooled ones counted as one (numbers: key block)")
    axis.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    axis.legend(
        handles, [f"factor {factor}" for factor in schedule.factors], ncols=6, loc="lower right", bbox_to_anchor=(1, 1)
    )
    save(figure, "6_schedule")


def draw_error(q, k, v, save):
    """Stage 7: error of every row of the output, sorted, with and without the two correction terms."""
    dense = F.scaled_dot_product_attention(q, k, v)
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    variants = {
        "published preset": PUBLISHED_PRESET,
        "full cover": COVER_PRESET.replace(key_variance=False, value_tilt=False),
        "full cover + key variance": COVER_PRESET.replace(value_tilt=False),
        "full cover + value tilt": COVER_PRESET.replace(key_variance=False),
        "full cover + both": COVER_PRESET,
    }
    for name, preset in variants.items():
        out, schedule = psa_attention(q, k, v, preset, grid=GRID, return_schedule=True)
        error = ((out - dense).norm(dim=-1) / dense.norm(dim=-1)).flatten().sort().values
        axis.plot(np.linspace(0, 100, len(error)), error, label=f"{name} (density {schedule.density():.3f})")
    axis.set(xlabel="% of the rows", ylabel="relative error of the row", yscale="log", ylim=(4e-2, 1))
    axis.legend(fontsize=8)
    save(figure, "7_attend")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures", help="folder for the pictures")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    def save(figure, name):
        figure.savefig(output / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        print(output / f"{name}.png")

    q, k, v = (x.float() for x in (load_file(ROOT / "docs/data/trained_head.safetensors")[name] for name in "qkv"))
    schedules = {
        name: psa_attention(q, k, v, preset, grid=GRID, return_schedule=True)[1]
        for name, preset in (("published", PUBLISHED_PRESET), ("full cover", COVER_PRESET))
    }
    draw_order(save)
    draw_pyramid(k, v, save)
    draw_importance(q, k, save)
    draw_levels(schedules, save)
    draw_schedule(schedules["full cover"], save)
    draw_error(q, k, v, save)


if __name__ == "__main__":
    main()
