"""Heads that a choice of levels is judged on, drawn or recorded, and what dense attention makes of them."""

import json
import math
import re
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_diffusers import PSAPreset
from psa_diffusers.ops.layout import Layout, make_layout
from psa_diffusers.ops.reference.importance import reduce_scores

from .fields import make_field


@dataclass(frozen=True, eq=False)
class Head:
    """q, k, v ``[1, 1, L, D]`` of one head, and where its tokens stand."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int, int]
    text_tokens: int
    text_first: bool
    scale: float


@dataclass(frozen=True, eq=False)
class Truth:
    """Dense attention of the sampled rows under one layout.

    Attributes:
        blocks: Sampled query blocks, all of them video.
        rows: Tokens of their queries.
        out: ``[rows, D]`` dense output.
        mass: ``[blocks, N]`` share of attention that each key block receives, mean over the queries of a block.
    """

    blocks: Tensor
    rows: Tensor
    out: Tensor
    mass: Tensor


def field_heads(args):
    """Synthetic heads, one a field, size and seed."""
    for grid in args.grids:
        for dim in args.dims:
            for text in args.text:
                for seed in args.seeds:
                    for field in args.fields:
                        name = f"{field} {'x'.join(map(str, grid))} D{dim} text{text} seed{seed}"
                        qkv = make_field(field, grid, dim, text_tokens=text, seed=seed)
                        yield Head(name, *qkv, grid, text, True, dim**-0.5)


def recorded_heads(args):
    """Heads of a safetensors file whose keys end in q, k and v; `record_qkv` writes such files, with their places."""
    from safetensors import safe_open

    with safe_open(args.qkv, "pt") as file:
        meta = file.metadata() or {}
        places = {record["key"]: record for record in json.loads(meta.get("records", "[]"))}
        of_file = {
            "grid": args.grid or [int(size) for size in re.findall(r"\d+", meta.get("grid", ""))],
            "text_tokens": int(meta.get("text_tokens", 0)) if args.text_tokens is None else args.text_tokens,
            "text_first": meta.get("text_first", "true").lower() != "false",
        }
        stems = sorted(key[: -len("q")] for key in file.keys() if re.fullmatch(r"(.*\.)?q", key))
        if not stems:
            sys.exit(f"{args.qkv}: expected keys that end in q, k and v, such as layer0.q; got {list(file.keys())[:5]}")
        number = 0
        for stem in stems:
            q, k, v = (file.get_tensor(stem + part).float() for part in "qkv")
            place = {"scale": q.shape[-1] ** -0.5, **of_file, **places.get(stem, {})}
            grid, text = tuple(place["grid"]), place["text_tokens"]
            if len(grid) != 3 or math.prod(grid) + text != q.shape[2]:
                sys.exit(
                    f"{args.qkv}: {q.shape[2]} tokens do not match grid {list(grid)} and {text} text tokens; "
                    "pass --grid FRAMES HEIGHT WIDTH and --text_tokens"
                )
            for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
                if args.part in (None, ("even", "odd")[number % 2]):
                    qkv = (x[b : b + 1, h : h + 1] for x in (q, k, v))
                    yield Head(f"{stem}{b}.{h}", *qkv, grid, text, place["text_first"], place["scale"])
                number += 1


def lay_out(head: Head, preset: PSAPreset) -> Layout:
    return make_layout(
        head.grid,
        head.text_tokens,
        head.text_first,
        preset.block_m,
        preset.block_n,
        preset.order,
        preset.tile_size,
        head.q.device,
    )


def dense_truth(head: Head, layout: Layout, sampled_queries: int) -> Truth:
    """Dense attention for evenly spread query blocks that hold about ``sampled_queries`` queries."""
    scale = head.scale
    video = layout.video_query_blocks
    count = min(video, max(1, sampled_queries // layout.block_m))
    blocks = torch.linspace(0, video, 2 * count + 1)[1::2].long().unique()
    lanes = layout.query_rows.view(-1, layout.block_m)[blocks]
    keys = layout.key_rows.clamp_min(0).long()
    empty = layout.key_rows < 0
    k, v = head.k[0, 0, keys], head.v[0, 0, keys]
    rows, outs, masses = [], [], []
    for lane in lanes:
        tokens = lane[lane >= 0].long()
        weights = (head.q[0, 0, tokens] @ k.T * scale).masked_fill_(empty, -math.inf).softmax(-1)
        rows.append(tokens)
        outs.append(weights @ v)
        masses.append(weights.view(len(tokens), layout.num_key_blocks, -1).sum(-1).mean(0))
    return Truth(blocks, torch.cat(rows), torch.cat(outs), torch.stack(masses))


def published_importance(head: Head, layout: Layout, scale: float, seed: int = 0) -> Tensor:
    """Largest softmaxed score of a quarter of the positions of both blocks, drawn once and shared by all blocks.

    Source: arXiv:2512.04025, section 3.
    """
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for x, rows, block in ((head.q, layout.query_rows, layout.block_m), (head.k, layout.key_rows, layout.block_n)):
        place = torch.randperm(block, generator=rng)[: block // 4].sort().values
        place[0] = 0  # a short block has its tokens at the front: one of them is looked at
        drawn = rows.view(-1, block)[:, place].flatten()
        parts += [x.index_select(2, drawn.clamp_min(0).long()), (drawn >= 0).float()]
    return reduce_scores(*parts, layout, 4, scale, mass=False)
