"""Stage 4: an estimate of how much attention each block of queries pays to each block of keys."""

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.reference.moments import moment_importance
from psa_diffusers.ops.reference.pyramid import Pyramid

POOLED_CELL = 16  # queries and keys a cell of pooled_mass
SAMPLE_STRIDE = 4  # sampled_max looks at every fourth token

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


def pool_rows(x: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean of the real tokens of every ``width`` lanes ``[B, H, lanes / width, D]``, and their number."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    real = (rows >= 0).to(wide)
    counts = real.view(-1, width).sum(1)
    source = rows.clamp_min(0)
    batch, heads, _, dim = x.shape
    cells = torch.empty(batch, heads, counts.shape[0], dim, dtype=x.dtype, device=x.device)
    divisor = counts.clamp_min(1)[:, None]
    chunk = max(1, _POOLED // (width * dim))  # cells at a time
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        for start in range(0, len(counts), chunk):
            part, lanes = slice(start, start + chunk), slice(start * width, (start + chunk) * width)
            tokens = x[b, h].index_select(0, source[lanes]).to(wide) * real[lanes, None]
            cells[b, h, part] = tokens.view(-1, width, dim).sum(1) / divisor[part]
    return cells, counts


def sample_rows(x: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first of every ``width`` lanes: ``[B, H, lanes / width, D]``, and 1 or 0 for a real or an empty lane."""
    rows = rows[::width]
    return x.index_select(2, rows.clamp_min(0).long()), (rows >= 0).to(torch.float32)


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
