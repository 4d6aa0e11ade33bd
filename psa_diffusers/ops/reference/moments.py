"""What mean pooling hides, estimated from the second moments of the keys and from a sample of query-key pairs.

Plain torch on any device; on a GPU all heads at a time.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.reference.pyramid import Pyramid

MOMENT_CELL = 16  # queries and keys a cell of pooled_moments
MOMENT_CAP = 8.0  # of the variance term of a logit: one outlier must not hide all other keys from a row
SHAPE_STRIDE = 16  # the shape of the variance is that of every sixteenth key cell
GAIN_QUERY_STRIDE = 512  # the gain of the tilt looks at every 512th query
GAIN_BLOCK_STRIDE = 16  # and every sixteenth key block


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


def fit_tilt(pyramid: Pyramid, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Pyramid:
    """Scale the covariance of each head by the gain at which the value tilt fits best.

    The tilt is of first order: within a cell the value moves by s q·C. Where the keys of a cell differ much, softmax
    saturates and the true shift is smaller.

    Args:
        pyramid: Pyramid with a covariance.
        q: Queries ``[B, H, L, D]``.
        k: Keys ``[B, H, L, D]``.
        v: Values ``[B, H, L, D]``.
        layout: Where tokens stand.
        scale: Softmax scale.
    """
    gain = tilt_gain(q, k, v, layout, scale).to(pyramid.covariance.dtype)
    return replace(pyramid, covariance=pyramid.covariance * gain[:, :, None, None, None])


@torch.no_grad()
def tilt_gain(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Regress how far values shift under softmax on how far the tilt says they shift, one number a head.

    The sample: every 512th query of the video, every sixteenth of its key blocks. The true shift of a pair is the mean
    value of the block under the softmax of its scores, less its plain mean; the tilt says s q·C, with the within-block
    covariance C of the sampled blocks.

    Args:
        q: Queries ``[B, H, L, D]``.
        k: Keys ``[B, H, L, D]``.
        v: Values ``[B, H, L, D]``.
        layout: Where tokens stand.
        scale: Softmax scale.

    Returns:
        ``[B, H]`` in [0, 1], float32 (float64 for float64 inputs). Pairs that are not finite do not count.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    n = layout.block_n
    # a block begins at each of these lanes, so a token stands there
    queries = layout.query_rows[: layout.video_query_blocks * layout.block_m : GAIN_QUERY_STRIDE]
    lanes = layout.key_rows[: layout.video_key_blocks * n].view(-1, n)[::GAIN_BLOCK_STRIDE]
    real = lanes >= 0
    count = real.sum(1).to(wide)
    keys, values = (_take(x, lanes.flatten()).to(wide).unflatten(2, lanes.shape) for x in (k, v))
    keys, values = (_centred(x, real, count) for x in (keys, values))
    covariance = keys.flatten(2, 3).mT @ values.flatten(2, 3) / count.sum()

    query = _take(q, queries).to(wide)
    expected = scale * query @ covariance
    scores = scale * query @ keys.flatten(2, 3).mT
    weights = scores.masked_fill(~real.flatten(), -torch.inf).unflatten(3, lanes.shape).softmax(-1)
    along = (expected @ values.flatten(2, 3).mT).unflatten(3, lanes.shape)
    agreement = (weights * along).sum(-1)
    size = expected.square().sum(-1, keepdim=True).expand_as(agreement)
    finite = torch.isfinite(agreement) & torch.isfinite(size)
    agreement, size = (torch.where(finite, x, 0).sum((2, 3)) for x in (agreement, size))
    return (agreement / size.clamp_min(torch.finfo(wide).tiny)).clamp(0, 1)


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


def _centred(x: Tensor, real: Tensor, count: Tensor) -> Tensor:
    """Tokens less the mean of their block, 0 where there is no token: ``[B, H, blocks, n, D]``."""
    x = torch.where(real[..., None], x, 0)
    return torch.where(real[..., None], x - x.sum(3, keepdim=True) / count[:, None, None], 0)


def _masked(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where((rows >= 0)[:, None], x, 0)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(-2, rows.clamp_min(0).long())
