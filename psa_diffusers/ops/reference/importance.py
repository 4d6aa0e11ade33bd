"""Stage 4: an estimate of how much attention each block of queries pays to each block of keys."""

from collections.abc import Iterator

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.types import MOMENT_CAP, MOMENT_CELL, POOLED_CELL, SAMPLE_STRIDE, SHAPE_STRIDE, Pyramid

_POOLED = 2**17  # numbers pooled at a time: half a MiB of float32 stays in the caches between the operators


def block_importance(
    q: Tensor, k: Tensor, layout: Layout, method: str, scale: float, pyramid: Pyramid | None = None
) -> Tensor:
    """Estimate the importance of every key block for every query block.

    Both estimators score representatives of the tokens, take the softmax over all keys, and reduce to blocks.
    ``pooled_mass``: cells of 16 tokens, a key cell weighing as many keys as it has; attention mass summed over the key
    block, averaged over the queries of the block. ``sampled_max``: every fourth token; the largest weight of a pair.

    Args:
        q: Queries ``[B, H, L, D]``, tokens as the model has them; any strides.
        k: Keys ``[B, H, L, D]``.
        layout: Where tokens stand.
        method: ``pooled_mass``, ``sampled_max``, or ``pooled_moments`` (see `moment_importance`).
        scale: Softmax scale.
        pyramid: Pyramid of these keys: a factor that is as wide as a cell saves pooling them again.

    Returns:
        ``[B, H, M, N]`` float32 (float64 for float64 inputs), not negative; NaN where a query or key is not finite.

    Source: ``sampled_max`` is the estimator of arXiv:2512.04025, section 3 (the official code computes another).
        Differs: the sample is strided, not random, so nothing depends on a random generator. ``pooled_mass`` is ours.
    """
    if method == "pooled_moments":
        return moment_importance(q, k, layout, scale)
    pooled = method == "pooled_mass"
    width = min(POOLED_CELL, layout.block_m, layout.block_n) if pooled else SAMPLE_STRIDE
    represent = pool_rows if pooled else sample_rows
    cells_q, counts_q = represent(q, layout.query_rows, width)
    if pooled and pyramid is not None and width in pyramid.factors[1:]:
        counts_k = layout.cell_counts(width)
        base = pyramid.bases[pyramid.factors.index(width)]
        cells_k = pyramid.keys[:, :, base : base + len(counts_k)]
    else:
        cells_k, counts_k = represent(k, layout.key_rows, width)
    return reduce_scores(cells_q, counts_q, cells_k, counts_k, layout, width, scale, mass=pooled)


@torch.no_grad()
def moment_importance(q: Tensor, k: Tensor, layout: Layout, scale: float) -> Tensor:
    """Estimate importance as `pooled_mass` does, and add what the scores vary within a key cell.

    Where the keys of a cell point in different directions their mean says little. To second order the mean of the
    exponentials is that of a cell whose score is higher by half the variance. The variance of a score is a quadratic
    form of the query; its shape is taken to be the same in all cells of a head, its size is the cell's own:

        score of (query cell, key cell) = s q̄·k̄ + min( ½ s² (q₁ᵀ S q₁ / tr S) · tr Σ_c , 8 )

    with the first query ``q₁`` of the query cell, the covariance ``Σ_c`` of the keys in the key cell, and ``S`` its sum
    over every sixteenth key cell of the head.

    Args:
        q: Queries ``[B, H, L, D]``, tokens as the model has them; any strides.
        k: Keys ``[B, H, L, D]``.
        layout: Where tokens stand.
        scale: Softmax scale.

    Returns:
        ``[B, H, M, N]`` float32 (float64 for float64 inputs), not negative; a row sums to 1. NaN where a query or key
        is not finite.
    """
    width = min(MOMENT_CELL, layout.block_m, layout.block_n)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_q, num_k, per_block = layout.num_query_blocks, layout.num_key_blocks, layout.block_m // width
    count_q, count_k = ((rows >= 0).view(-1, width).sum(1).to(wide) for rows in (layout.query_rows, layout.key_rows))
    share = count_q / count_q.view(num_q, -1).sum(1).repeat_interleave(per_block)
    importance = torch.empty(*q.shape[:2], num_q, num_k, dtype=wide, device=q.device)
    budget = 2**18 if q.is_cpu else 2**24  # scores at a time: 1 MiB stays in the caches of a CPU
    for b, heads, blocks in _pieces(q.shape, num_q, per_block * len(count_k), budget):
        if blocks.start == 0:
            keys, traces, shape = _key_moments(k[b, heads], layout.key_rows, count_k, width, wide)
        cells = slice(blocks.start * per_block, blocks.stop * per_block)
        lanes = layout.query_rows[cells.start * width : cells.stop * width]
        queries = _take(q[b, heads], lanes).to(wide)
        first = queries[:, ::width]
        queries = _masked(queries, lanes).unflatten(1, (-1, width)).sum(2) / count_q[cells].clamp_min(1)[:, None]
        spread = ((first @ shape) * first).sum(-1, keepdim=True) * (0.5 * scale**2)
        scores = torch.baddbmm((spread * traces[:, None]).clamp_max_(MOMENT_CAP), queries, keys.mT, alpha=scale)
        weights = scores.add_(count_k.log()).softmax(-1).unflatten(2, (num_k, -1)).sum(-1)
        part = share[cells][:, None]
        weights = torch.where(part > 0, weights * part, 0)
        importance[b, heads, blocks] = weights.unflatten(1, (-1, per_block)).sum(2)
    return importance


def pool_rows(x: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean of the real tokens of every ``width`` lanes ``[B, H, lanes / width, D]``, and their number."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    empty = (rows < 0)[:, None]
    counts = (rows >= 0).view(-1, width).sum(1).to(wide)
    source = rows.clamp_min(0)
    batch, heads, _, dim = x.shape
    cells = torch.empty(batch, heads, counts.shape[0], dim, dtype=x.dtype, device=x.device)
    divisor = counts.clamp_min(1)[:, None]
    chunk = max(1, _POOLED // (width * dim))  # cells at a time
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        for start in range(0, len(counts), chunk):
            part, lanes = slice(start, start + chunk), slice(start * width, (start + chunk) * width)
            tokens = x[b, h].index_select(0, source[lanes]).to(wide).masked_fill_(empty[lanes], 0)
            cells[b, h, part] = tokens.view(-1, width, dim).sum(1) / divisor[part]
    return cells, counts


def sample_rows(x: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first of every ``width`` lanes ``[B, H, lanes / width, D]``, 0 if empty, and 1 or 0 for real or empty."""
    rows = rows[::width]
    taken = x.index_select(2, rows.clamp_min(0).long())
    return taken.masked_fill_((rows < 0)[:, None], 0), (rows >= 0).to(torch.float32)


def reduce_scores(
    cells_q: Tensor,
    counts_q: Tensor,
    cells_k: Tensor,
    counts_k: Tensor,
    layout: Layout,
    width: int,
    scale: float,
    *,
    mass: bool,
) -> Tensor:
    """Softmax of cell scores, reduced to blocks: sum over key cells and mean over queries, or the maximum of both."""
    wide = torch.float64 if cells_q.dtype == torch.float64 else torch.float32
    num_q, num_k = layout.num_query_blocks, layout.num_key_blocks
    batch, heads = cells_q.shape[:2]
    weight_q, bias = counts_q.to(wide), counts_k.to(wide).log()
    importance = torch.empty(batch, heads, num_q, num_k, dtype=wide, device=cells_q.device)
    per_block = layout.block_m // width
    chunk = max(1, 2**18 // (per_block * cells_k.shape[2]))  # query blocks at a time: 1 MiB of scores
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        keys = cells_k[b, h].to(wide).T * scale
        for start in range(0, num_q, chunk):
            blocks = slice(start, min(start + chunk, num_q))
            cells = slice(blocks.start * per_block, blocks.stop * per_block)
            weights = (cells_q[b, h, cells].to(wide) @ keys + bias).softmax(-1)
            weights = weights.view(blocks.stop - start, per_block, num_k, -1)
            share = weight_q[cells].view(-1, per_block, 1)
            if mass:
                rows = torch.where(share > 0, weights.sum(-1), 0) * share
                importance[b, h, blocks] = rows.sum(1) / share.sum(1)
            else:
                importance[b, h, blocks] = torch.where(share > 0, weights.amax(-1), 0).amax(1)
    return importance


def _pieces(shape, num_q: int, scores_a_block: int, budget: int) -> Iterator[tuple[int, slice, slice]]:
    """Batch index, heads and query blocks to work on at a time, so that no more scores than the budget exist."""
    at_once = max(1, min(shape[1], budget // (num_q * scores_a_block)))
    blocks = max(1, budget // (at_once * scores_a_block))
    for b in range(shape[0]):
        for head in range(0, shape[1], at_once):
            for start in range(0, num_q, blocks):
                yield b, slice(head, head + at_once), slice(start, min(start + blocks, num_q))


def _key_moments(k: Tensor, rows: Tensor, counts: Tensor, width: int, wide) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key ``[H, C, D]`` and trace of the covariance ``[H, C]`` of each cell, shape of trace 1 ``[H, D, D]``."""
    tokens = _take(k, rows).to(wide).unflatten(1, (-1, width))
    real = (rows >= 0).view(-1, width)
    divisor = counts.clamp_min(1)
    means = torch.where(real[..., None], tokens, 0).sum(2) / divisor[:, None]
    away = torch.where(real[..., None], tokens - means[:, :, None], 0)
    sample = away[:, ::SHAPE_STRIDE].flatten(1, 2)
    shape = sample.mT @ sample
    trace = shape.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(wide).tiny)
    return means, away.square().sum((2, 3)) / divisor, shape / trace[:, None, None]


def _masked(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where((rows >= 0)[:, None], x, 0)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(-2, rows.clamp_min(0).long())
