"""Stage 3: mean-pooled copies of keys and values, at every factor that a level map may ask for."""

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.types import Factors, Pyramid, pooled_rows

_POOLED = 2**18  # numbers pooled at a time: 1 MiB of float32 stays in the caches between the operators


def build_pyramid(
    k: Tensor, v: Tensor, layout: Layout, factors: Factors, *, key_variance: bool = False, value_tilt: bool = False
) -> Pyramid:
    """Pool keys and values over the cells of every factor.

    Args:
        k: Keys ``[B, H, L, D]``, tokens as the model has them; any strides.
        v: Values ``[B, H, L, D]``.
        layout: Where tokens stand.
        factors: Pooling factors, ascending powers of two from 1 to at most ``layout.block_n``.
        key_variance: Whether to keep the key variance of each cell.
        value_tilt: Whether to keep, for each factor, the covariance of keys and values within cells.

    Source: arXiv:2512.04025, section 3, mean pooling. Differs: means are over real tokens only; variance and
        covariance are ours (docs/developer/concept.md).
    """
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    batch, heads, tokens, dim = k.shape
    lanes = layout.key_rows.shape[0]
    bases, num_rows = pooled_rows(lanes, factors)
    rows = layout.key_rows.clamp_min(0).long()
    empty = (layout.key_rows < 0)[:, None]
    counts = [layout.cell_counts(factor) for factor in factors]
    chunk = layout.block_n * max(1, _POOLED // (layout.block_n * dim))

    keys, values = (torch.empty(batch, heads, num_rows, dim, dtype=x.dtype, device=x.device) for x in (k, v))
    variance = torch.zeros(batch, heads, num_rows, dtype=wide, device=k.device) if key_variance else None
    covariance = torch.zeros(batch, heads, len(factors), dim, dim, dtype=wide, device=k.device) if value_tilt else None
    finite = torch.empty(batch, heads, dtype=torch.bool, device=k.device)

    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        finite[b, h] = torch.isfinite(k[b, h].sum(dtype=wide) + v[b, h].sum(dtype=wide))
        if num_rows == 0:
            continue
        for start in range(0, lanes, chunk):  # a few blocks at a time: wide copies stay small
            part = slice(start, min(start + chunk, lanes))
            # empty lanes hold zeros: they add nothing to a sum. Not by a product: the token in their place may be NaN
            token_k, token_v = (
                x[b, h].index_select(0, rows[part]).to(wide).masked_fill_(empty[part], 0) for x in (k, v)
            )
            for f, (factor, base) in enumerate(zip(factors, bases, strict=True)):
                if factor == 1:
                    continue
                own = slice(part.start // factor, part.stop // factor)  # among the cells of the factor
                cells = slice(base + own.start, base + own.stop)
                divisor = counts[f][own].clamp_min(1)[:, None]
                mean_k, mean_v = (x.view(-1, factor, dim).sum(1) / divisor for x in (token_k, token_v))
                keys[b, h, cells], values[b, h, cells] = mean_k, mean_v
                if key_variance or value_tilt:
                    delta_k = (token_k - mean_k.repeat_interleave(factor, 0)).masked_fill(empty[part], 0)
                if variance is not None:
                    variance[b, h, cells] = delta_k.square().mean(1).view(-1, factor).sum(1) / divisor[:, 0]
                if covariance is not None:
                    delta_v = (token_v - mean_v.repeat_interleave(factor, 0)).masked_fill(empty[part], 0)
                    covariance[b, h, f] += delta_k.T @ delta_v / tokens

    log_counts = [count.to(wide).log() for factor, count in zip(factors, counts, strict=True) if factor > 1]
    return Pyramid(
        factors=tuple(factors),
        bases=bases,
        keys=keys,
        values=values,
        log_counts=torch.cat(log_counts) if log_counts else torch.zeros(0, dtype=wide, device=k.device),
        variance=variance,
        covariance=covariance,
        finite=finite,
    )
