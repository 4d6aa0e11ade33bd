"""Stage 3: mean-pooled copies of keys and values, at every factor that a level map may ask for."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout

_POOLED = 2**18  # numbers pooled at a time: 1 MiB of float32 stays in the caches between the operators


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Pooled keys and values, all factors in one row index space.

    Cell ``c`` of key block ``j`` at factor ``h > 1`` is row ``bases[h] + j * block_n / h + c``. Factor 1 is not stored:
    its cells are the tokens themselves, read from k and v through ``Layout.key_rows``.

    Attributes:
        factors: Factors a level map may hold, ascending; the first is 1.
        bases: First row of each factor, in the order of ``factors`` (0 for factor 1, which has no rows).
        keys: ``[B, H, P, D]`` mean key of the real tokens of each cell; undefined for an empty cell.
        values: ``[B, H, P, D]`` mean value, likewise.
        log_counts: ``[P]`` float32, log of the number of real tokens of each cell, ``-inf`` where there is none.
        variance: ``[B, H, P]`` float32, mean over channels of the key variance within the cell; None without
            key_variance.
        covariance: ``[B, H, F, D, D]`` float32, at ``factors[f]`` the sum over all real key tokens of
            ``(k - mean key)^T (v - mean value) / L``, the means being those of the token's cell; zero at factor 1.
            None without value_tilt.
        finite: ``[B, H]`` bool, whether all keys and values of the head are finite numbers.
        ready: What to wait for before the covariance is read, on a GPU that is still at it.
        cells: ``[B, H, cells, D]`` mean keys of cells of 16 tokens and ``[B, H, cells]`` their variance (or None): what
            the kernels' estimate of importance reads, kept where no factor has it.
    """

    factors: tuple[int, ...]
    bases: tuple[int, ...]
    keys: Tensor
    values: Tensor
    log_counts: Tensor
    variance: Tensor | None
    covariance: Tensor | None
    finite: Tensor
    ready: torch.cuda.Event | None = None
    cells: tuple[Tensor, Tensor | None] | None = None


def pooled_rows(lanes: int, factors: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """First row of each factor in a pyramid over ``lanes`` key lanes, and the number of rows in all."""
    sizes = [lanes // factor if factor > 1 else 0 for factor in factors]
    return tuple(accumulate(sizes[:-1], initial=0)), sum(sizes)


def build_pyramid(
    k: Tensor,
    v: Tensor,
    layout: Layout,
    factors: tuple[int, ...],
    *,
    key_variance: bool = False,
    value_tilt: bool = False,
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
    if k.is_cuda and torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        return pool_at_once(k, v, layout, factors, key_variance=key_variance, value_tilt=value_tilt)
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    batch, heads, tokens, dim = k.shape
    lanes = layout.key_rows.shape[0]
    bases, num_rows = pooled_rows(lanes, factors)
    rows = layout.key_rows.clamp_min(0).long()
    real = (layout.key_rows >= 0).to(wide)[:, None]
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
            # empty lanes hold zeros: they add nothing to a sum
            token_k, token_v = (x[b, h].index_select(0, rows[part]).to(wide).mul_(real[part]) for x in (k, v))
            for f, (factor, base) in enumerate(zip(factors, bases, strict=True)):
                if factor == 1:
                    continue
                own = slice(part.start // factor, part.stop // factor)  # among the cells of the factor
                cells = slice(base + own.start, base + own.stop)
                divisor = counts[f][own].clamp_min(1)[:, None]
                mean_k, mean_v = (x.view(-1, factor, dim).sum(1) / divisor for x in (token_k, token_v))
                keys[b, h, cells], values[b, h, cells] = mean_k, mean_v
                if key_variance or value_tilt:
                    delta_k = (token_k - mean_k.repeat_interleave(factor, 0)) * real[part]
                if key_variance:
                    variance[b, h, cells] = delta_k.square().mean(1).view(-1, factor).sum(1) / divisor[:, 0]
                if value_tilt:
                    delta_v = (token_v - mean_v.repeat_interleave(factor, 0)) * real[part]
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


def pool_at_once(
    k: Tensor, v: Tensor, layout: Layout, factors: tuple[int, ...], *, key_variance: bool, value_tilt: bool
) -> Pyramid:
    """`build_pyramid` for training on a GPU: all heads in a few operators, which a backward pass remembers."""
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    bases, _ = pooled_rows(layout.key_rows.shape[0], factors)
    rows = layout.key_rows.clamp_min(0).long()
    real = (layout.key_rows >= 0).to(wide)[:, None]
    token_k, token_v = (x.index_select(2, rows).to(wide) * real for x in (k, v))
    empty = token_k[:, :, :0]
    keys, values, log_counts, variance = [empty], [empty], [empty.new_zeros(0)], [empty[..., 0]]
    covariance = [token_k.new_zeros(*k.shape[:2], k.shape[3], k.shape[3])]
    for factor in factors[1:]:
        count = layout.cell_counts(factor).to(wide)
        divisor = count.clamp_min(1)[:, None]
        mean_k, mean_v = (x.unflatten(2, (-1, factor)).sum(3) / divisor for x in (token_k, token_v))
        keys.append(mean_k)
        values.append(mean_v)
        log_counts.append(count.log())
        if key_variance or value_tilt:
            delta_k = (token_k - mean_k.repeat_interleave(factor, 2)) * real
        if key_variance:
            variance.append(delta_k.square().mean(3).unflatten(2, (-1, factor)).sum(3) / divisor[:, 0])
        if value_tilt:
            delta_v = (token_v - mean_v.repeat_interleave(factor, 2)) * real
            covariance.append(delta_k.mT @ delta_v / k.shape[2])
    return Pyramid(
        factors=tuple(factors),
        bases=bases,
        keys=torch.cat(keys, 2).to(k.dtype),
        values=torch.cat(values, 2).to(v.dtype),
        log_counts=torch.cat(log_counts),
        variance=torch.cat(variance, 2) if key_variance else None,
        covariance=torch.stack(covariance, 2) if value_tilt else None,
        finite=torch.isfinite(k.detach().sum((2, 3), dtype=wide) + v.detach().sum((2, 3), dtype=wide)),
    )
