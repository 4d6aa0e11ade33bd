"""Stage 7: attention of every query block over the cells its schedule lists, in one softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_diffusers.layout import Layout
from psa_diffusers.stages.pyramid import Pyramid
from psa_diffusers.stages.schedule import Schedule

_GATHER_ELEMENTS = 2**20  # numbers gathered at a time: 4 MiB of float32 stay in the caches until they are read


def attend(
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
    """Read each kept block at its factor; the definition of docs/concept.md, cell by cell.

    Gathers the cells of a few query blocks at a time and leaves the arithmetic to ``scaled_dot_product_attention``,
    with the log of the cell sizes (and the key variance) as bias. The share of attention that each factor receives,
    which the value tilt needs, comes out of the same call as extra value channels.

    Args:
        q: Queries ``[B, H, L, D]``, tokens as the model has them; any strides.
        k: Keys ``[B, H, L, D]``, read where the factor is 1.
        v: Values ``[B, H, L, D]``.
        pyramid: Pooled keys and values; its ``variance`` and ``covariance`` switch the two correction terms on.
        schedule: Which block at which factor.
        layout: Where tokens stand.
        scale: Softmax scale.
        variance_cap: Largest key-variance bias.

    Returns:
        ``[B, H, L, D]`` in the order and dtype of q. A row that keeps nothing is 0.
    """
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            _attend_head(out, q, k, v, pyramid, schedule, layout, (b, h), scale, variance_cap)
    return out


def _attend_head(out, q, k, v, pyramid, schedule, layout, head, scale, variance_cap) -> None:
    tokens, dim = q.shape[2:]
    m = layout.block_m
    wide = pyramid.log_counts.dtype
    bias = torch.cat([torch.zeros(tokens, dtype=wide, device=q.device), pyramid.log_counts])
    tilt = pyramid.covariance is not None and len(pyramid.factors) > 1
    cells = torch.cat([torch.cat([k[head], pyramid.keys[head]]), torch.cat([v[head], pyramid.values[head]])], 1)
    if tilt:
        cells = torch.cat([cells, _factor_channels(pyramid, cells, tokens)], 1)
    key_extra = cells.shape[1] - 2 * dim
    if not q.is_cpu:  # only the CPU's SDPA takes a float32 bias beside half-precision queries
        cells = cells.to(wide)
    if pyramid.variance is not None:
        spread = F.pad(pyramid.variance[head], (tokens, 0))
        spread = torch.where(torch.isfinite(spread), spread, 0)

    rows, lengths = _cell_rows(schedule, pyramid, layout, head, tokens)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    limit = max(1, _GATHER_ELEMENTS // cells.shape[1])
    # blocks of like length side by side, so that little is padded; long rows first
    for blocks in _groups(lengths, limit):
        count = lengths[blocks]
        slot = torch.arange(int(count.max()), device=q.device)
        real = slot < count[:, None]
        # padding repeats the block's first cell at weight zero: a cell that is not read must not matter, NaN or not
        index = _take(rows, torch.where(real, slot, 0) + starts[blocks][:, None])
        block_bias = torch.where(real, _take(bias, index), -torch.inf)
        query_rows = layout.query_rows.view(-1, m)[blocks]
        lanes = query_rows >= 0
        query = _take(q[head], query_rows.clamp_min(0)).to(cells.dtype)
        if pyramid.variance is not None:
            norm = query.to(wide).square().sum(-1) * lanes
            norm = torch.where(torch.isfinite(norm), norm, 0).sum(1) / lanes.sum(1)
            block_bias = block_bias + (0.5 * scale**2 * norm[:, None] * _take(spread, index)).clamp_max(variance_cap)
        gathered = _take(cells, index)
        read = F.scaled_dot_product_attention(
            _widen(query, key_extra)[:, None],
            _widen(gathered[..., :dim], key_extra)[:, None],
            gathered[..., dim:][:, None],
            attn_mask=block_bias[:, None, None].expand(-1, 1, m, -1),
            scale=scale,
        )[:, 0]
        result = read[..., :dim]
        if tilt:
            result = result + _tilt(query, read[..., dim:], pyramid, head, scale)
        out[head][query_rows[lanes].long()] = result[lanes].to(q.dtype)


def _widen(x: Tensor, extra: int) -> Tensor:
    return F.pad(x, (0, extra)) if extra else x


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, which copies whole rows instead of numbers: several times faster on a CPU."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def _cell_rows(
    schedule: Schedule, pyramid: Pyramid, layout: Layout, head: tuple[int, int], tokens: int
) -> tuple[Tensor, Tensor]:
    """Rows of `cells` that each query block reads, block after block ``[sum of lengths]``, and the ``[M]`` lengths.

    Token rows come first in `cells`, the pyramid's rows after them. Lanes without a token are left out.
    """
    num_blocks, n = layout.num_key_blocks, layout.block_n
    ids, offsets = schedule.block_ids[head].long(), schedule.offsets[head].long()
    slot = torch.arange(num_blocks, device=ids.device)
    group = (slot[:, None] >= offsets[:, None, 1:]).sum(-1)
    kept = slot < offsets[:, -1:]
    # cells of (factor, block): rows start at first[f, j], and real tokens make the first size[f, j] of them
    factors = torch.tensor(pyramid.factors, device=ids.device)[:, None]
    block = torch.arange(num_blocks, device=ids.device)
    bases = torch.tensor(pyramid.bases, device=ids.device)[:, None] + tokens
    first = bases + block * (n // factors)
    size = -(-layout.key_counts.long() // factors)
    query_block, slot = kept.nonzero(as_tuple=True)
    group, ids = group[query_block, slot], ids[query_block, slot]
    sizes = size[group, ids]
    ends = sizes.cumsum(0)
    cell = torch.arange(int(ends[-1]) if len(ends) else 0, device=ids.device) - (ends - sizes).repeat_interleave(sizes)
    token_lane = (ids * n).repeat_interleave(sizes) + cell
    rows = torch.where(
        (group == 0).repeat_interleave(sizes),
        layout.key_rows.long()[token_lane.clamp_max(num_blocks * n - 1)],
        first[group, ids].repeat_interleave(sizes) + cell,
    )
    lengths = torch.zeros(layout.num_query_blocks, dtype=torch.long, device=ids.device)
    return rows, lengths.index_add_(0, query_block, sizes)


def _groups(lengths: Tensor, limit: int):
    """Query blocks that read something, longest first, in groups whose padded length stays within the limit."""
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    start = 0
    while start < len(sizes) and sizes[start]:
        stop = min(len(sizes), start + max(1, limit // sizes[start]))
        # a block less than half as long as the first of its group waits for the next group
        while 2 * sizes[stop - 1] < sizes[start]:
            stop -= 1
        yield order[start:stop]
        start = stop


def _factor_channels(pyramid: Pyramid, cells: Tensor, tokens: int) -> Tensor:
    """``[rows, channels]``: 1 in channel f for the rows of pooled factor f, so that attention sums their weights."""
    pooled = len(pyramid.factors) - 1
    channels = cells.new_zeros(cells.shape[0], -(-pooled // 8) * 8)
    for f, (start, stop) in enumerate(zip(pyramid.bases[1:], (*pyramid.bases[2:], pyramid.keys.shape[2]), strict=True)):
        channels[tokens + start : tokens + stop, f] = 1
    return channels


def _tilt(query: Tensor, shares: Tensor, pyramid: Pyramid, head: tuple[int, int], scale: float) -> Tensor:
    """s q_r . sum over pooled factors of share x covariance: ``[blocks, m, D]``."""
    covariance = pyramid.covariance[head]
    wide = covariance.dtype
    total = torch.zeros_like(query, dtype=wide)
    for f in range(1, len(pyramid.factors)):
        share = shares[..., f - 1 : f].to(wide)
        # a head of NaN values has a NaN covariance: it counts only where the factor was read
        total += torch.where(share > 0, share * (query.to(wide) @ covariance[f]), 0)
    return total * scale
