"""Stage 7 for training on a GPU: the same attention over all cells at once, what is not read masked out.

Costs the work of dense attention and the memory of a mask, but is a handful of operators with a backward pass, where
`attend` loops over heads and groups of query blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.reference.pyramid import Pyramid
from psa_diffusers.ops.reference.schedule import Schedule

MASK_BYTES = 2**32  # largest mask; beyond it `attend` loops
_ALIGNED = 16  # cells: memory-efficient SDPA copies masks of other widths


def mask_bytes(q: Tensor, pyramid: Pyramid, layout: Layout) -> int:
    """Size of the mask that `attend_masked` would make."""
    cells = layout.key_rows.shape[0] + pyramid.keys.shape[2]
    return q.shape[0] * q.shape[1] * layout.query_rows.shape[0] * cells * q.element_size()


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pyramid: Pyramid,
    schedule: Schedule,
    layout: Layout,
    *,
    scale: float,
    variance_cap: float,
) -> Tensor:
    """Read each kept block at its factor. Arguments and result as in `attend`, for finite inputs.

    The key-variance term counts as planning: no gradient goes through it.
    """
    level_map = schedule.to_level_map()
    query = _rows(q, layout.query_rows)
    key = torch.cat([_rows(k, layout.key_rows), pyramid.keys], 2)
    value = torch.cat([_rows(v, layout.key_rows), pyramid.values], 2)
    with torch.no_grad():
        bias = _bias(query, level_map, pyramid, layout, scale, variance_cap)
    reads = bias.amax(-1) > -torch.inf
    bias = torch.where(reads[..., None], bias, 0)
    dim, num_pooled = q.shape[-1], len(pyramid.factors) - 1
    has_tilt = pyramid.covariance is not None and num_pooled > 0
    if has_tilt:
        channels = _factor_channels(pyramid, layout, value)
        query, key = (F.pad(x, (0, channels.shape[1])) for x in (query, key))
        value = torch.cat([value, channels.expand(*value.shape[:2], -1, -1)], 3)
    short = -key.shape[2] % _ALIGNED
    key, value = (F.pad(x, (0, 0, 0, short)) for x in (key, value))
    mask = F.pad(bias, (0, short), value=-torch.inf).to(query.dtype).repeat_interleave(layout.block_m, 2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if has_tilt:
        out, shares = out[..., :dim], out[..., dim : dim + num_pooled]
        wide = pyramid.covariance.dtype
        turned = torch.einsum("bhld,bhfde->bhlfe", query[..., :dim].to(wide), pyramid.covariance[:, :, 1:])
        out = out + (scale * (shares[..., None].to(wide) * turned).sum(3)).to(out.dtype)
    out = out * reads.repeat_interleave(layout.block_m, 2)[..., None]
    # empty lanes go to a row of their own: to leave them out by number would wait for the GPU
    tokens = q.shape[2]
    target = torch.where(layout.query_rows >= 0, layout.query_rows, tokens).long()
    placed = q.new_zeros(*q.shape[:2], tokens + 1, dim).index_copy(2, target, out.to(q.dtype))
    return placed[:, :, :tokens]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(2, rows.clamp_min(0).long())


def _bias(query, level_map, pyramid, layout, scale, variance_cap) -> Tensor:
    """What is added to the score of every cell ``[B, H, M, cells]``: ``-inf`` where it is not read."""
    wide = pyramid.log_counts.dtype
    real = layout.key_rows >= 0
    parts = [torch.where(real, 0, -torch.inf).to(wide).expand(*level_map.shape[:3], -1)]
    pooled = pyramid.log_counts
    if pyramid.variance is not None:
        lanes = (layout.query_rows >= 0).view(-1, layout.block_m)
        norm = query.to(wide).square().sum(-1).unflatten(2, lanes.shape) * lanes
        norm = norm.sum(-1, keepdim=True) / lanes.sum(1, keepdim=True)
        pooled = pooled + (0.5 * scale**2 * norm * pyramid.variance[:, :, None]).clamp_max(variance_cap)
    parts.append(pooled.expand(*level_map.shape[:3], -1))
    kept = [(level_map == factor).repeat_interleave(layout.block_n // factor, 3) for factor in pyramid.factors]
    return torch.where(torch.cat(kept, 3), torch.cat(parts, 3), -torch.inf)


def _factor_channels(pyramid: Pyramid, layout: Layout, value: Tensor) -> Tensor:
    """``[cells, channels]``: 1 in channel f for cells of pooled factor f, so that attention sums their weights."""
    sizes = [layout.key_rows.shape[0] // factor for factor in pyramid.factors]
    channels = value.new_zeros(sum(sizes), -(-(len(sizes) - 1) // 8) * 8)
    start = sizes[0]
    for f, size in enumerate(sizes[1:]):
        channels[start : start + size, f] = 1
        start += size
    return channels
