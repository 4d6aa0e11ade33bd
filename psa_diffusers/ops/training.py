"""The backend that trains on a GPU: what carries gradients is a handful of operators, which a backward pass remembers.

Pooling takes all heads at once. Attention is the same attention over all cells, what is not read masked out: it costs
the work of dense attention and the memory of a mask, where `ops.reference` loops over heads and groups of query blocks.
The other stages are those of `ops.reference`; no gradient goes through what they decide.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.reference import (
    assign_block_levels,
    block_importance,
    fit_tilt,
    key_cosine_cap,
    make_schedule,
    plan_blocks,
)
from psa_diffusers.ops.reference.attend import factor_channels
from psa_diffusers.ops.types import KEY_VARIANCE_CAP, Factors, Pyramid, Schedule, pooled_rows

__all__ = [
    "assign_block_levels", "attend", "block_importance", "build_pyramid", "fit_tilt", "key_cosine_cap",
    "make_schedule", "plan_blocks",
]  # fmt: skip

MASK_BYTES = 2**32  # largest mask worth its memory
_ALIGNED = 16  # cells: memory-efficient SDPA copies masks of other widths


def mask_bytes(q: Tensor, layout: Layout, factors: Factors) -> int:
    """Size of the mask that `attend` would make."""
    lanes = layout.key_rows.shape[0]
    cells = lanes + pooled_rows(lanes, factors)[1]
    return q.shape[0] * q.shape[1] * layout.query_rows.shape[0] * cells * q.element_size()


def build_pyramid(
    k: Tensor, v: Tensor, layout: Layout, factors: Factors, *, key_variance: bool = False, value_tilt: bool = False
) -> Pyramid:
    """Pool keys and values over the cells of every factor, as in `ops.reference`, all heads in a few operators."""
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    bases, _ = pooled_rows(layout.key_rows.shape[0], factors)
    rows = layout.key_rows.clamp_min(0).long()
    # where no token is, zeros are selected: a product would keep the NaN of the token that is read in its place
    real = (layout.key_rows >= 0)[:, None]
    token_k, token_v = (torch.where(real, x.index_select(2, rows).to(wide), 0) for x in (k, v))
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
            delta_k = torch.where(real, token_k - mean_k.repeat_interleave(factor, 2), 0)
        if key_variance:
            variance.append(delta_k.square().mean(3).unflatten(2, (-1, factor)).sum(3) / divisor[:, 0])
        if value_tilt:
            delta_v = torch.where(real, token_v - mean_v.repeat_interleave(factor, 2), 0)
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


def attend(
    q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, schedule: Schedule, layout: Layout, scale: float
) -> Tensor:
    """Read each kept block at its factor, as in `ops.reference`, for finite inputs.

    The key-variance term counts as planning: no gradient goes through it.
    """
    level_map = schedule.to_level_map()
    query = _rows(q, layout.query_rows)
    key = torch.cat([_rows(k, layout.key_rows), pyramid.keys], 2)
    value = torch.cat([_rows(v, layout.key_rows), pyramid.values], 2)
    with torch.no_grad():
        bias = _bias(query, level_map, pyramid, layout, scale)
    reads = bias.amax(-1) > -torch.inf
    bias = torch.where(reads[..., None], bias, 0)
    dim, num_pooled = q.shape[-1], len(pyramid.factors) - 1
    covariance = pyramid.covariance if num_pooled else None
    if covariance is not None:
        channels = factor_channels([layout.key_rows.shape[0] // factor for factor in pyramid.factors], value)
        query, key = (F.pad(x, (0, channels.shape[1])) for x in (query, key))
        value = torch.cat([value, channels.expand(*value.shape[:2], -1, -1)], 3)
    short = -key.shape[2] % _ALIGNED
    key, value = (F.pad(x, (0, 0, 0, short)) for x in (key, value))
    mask = F.pad(bias, (0, short), value=-torch.inf).to(query.dtype).repeat_interleave(layout.block_m, 2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if covariance is not None:
        out, shares = out[..., :dim], out[..., dim : dim + num_pooled]
        wide = covariance.dtype
        turned = torch.einsum("bhld,bhfde->bhlfe", query[..., :dim].to(wide), covariance[:, :, 1:])
        out = out + (scale * (shares[..., None].to(wide) * turned).sum(3)).to(out.dtype)
    out = torch.where(reads.repeat_interleave(layout.block_m, 2)[..., None], out, 0)
    # empty lanes go to a row of their own: to leave them out by number would wait for the GPU
    tokens = q.shape[2]
    target = torch.where(layout.query_rows >= 0, layout.query_rows, tokens).long()
    placed = q.new_zeros(*q.shape[:2], tokens + 1, dim).index_copy(2, target, out.to(q.dtype))
    return placed[:, :, :tokens]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where((rows >= 0)[:, None], x.index_select(2, rows.clamp_min(0).long()), 0)


def _bias(query: Tensor, level_map: Tensor, pyramid: Pyramid, layout: Layout, scale: float) -> Tensor:
    """What is added to the score of every cell ``[B, H, M, cells]``: ``-inf`` where it is not read."""
    wide = pyramid.log_counts.dtype
    real = layout.key_rows >= 0
    parts = [torch.where(real, 0, -torch.inf).to(wide).expand(*level_map.shape[:3], -1)]
    pooled = pyramid.log_counts
    if pyramid.variance is not None:
        lanes = (layout.query_rows >= 0).view(-1, layout.block_m)
        norm = query.to(wide).square().sum(-1).unflatten(2, lanes.shape)  # 0 in empty lanes
        norm = norm.sum(-1, keepdim=True) / lanes.sum(1, keepdim=True)
        pooled = pooled + (0.5 * scale**2 * norm * pyramid.variance[:, :, None]).clamp_max(KEY_VARIANCE_CAP)
    parts.append(pooled.expand(*level_map.shape[:3], -1))
    kept = [(level_map == factor).repeat_interleave(layout.block_n // factor, 3) for factor in pyramid.factors]
    return torch.where(torch.cat(kept, 3), torch.cat(parts, 3), -torch.inf)
