"""Stage 7: attention of every query block over the cells its schedule lists, in one softmax."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.types import KEY_VARIANCE_CAP, Pyramid, Schedule

_LISTED = 2**16  # cells listed at a time: enough that the cost of listing them is that of few operators
_GATHERED = 2**19  # numbers of keys gathered at a time: 2 MiB of float32, and as many of values, stay in the caches


def attend(
    q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, schedule: Schedule, layout: Layout, scale: float
) -> Tensor:
    """Read each kept block at its factor; the definition of docs/developer/concept.md, cell by cell.

    Gathers the cells of a few query blocks at a time and leaves the arithmetic to ``scaled_dot_product_attention``,
    with the log of the cell sizes (and the key variance) as bias. The share of attention that each factor receives,
    which the value tilt needs, comes out of the same call as extra value channels. Query blocks that read everything
    at factor 1, as those of text do, are plain dense attention.

    Args:
        q: Queries ``[B, H, L, D]``, tokens as the model has them; any strides.
        k: Keys ``[B, H, L, D]``, read where the factor is 1.
        v: Values ``[B, H, L, D]``.
        pyramid: Pooled keys and values; its ``variance`` and ``covariance`` switch the two correction terms on.
        schedule: Which block at which factor.
        layout: Where tokens stand.
        scale: Softmax scale.

    Returns:
        ``[B, H, L, D]`` in the order and dtype of q. A row that keeps nothing is 0.
    """
    out = torch.zeros_like(q)
    tables = _row_tables(pyramid, layout)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        head = _Head(
            keys=(k[b, h], pyramid.keys[b, h]),
            values=(v[b, h], pyramid.values[b, h]),
            log_counts=pyramid.log_counts,
            variance=None if pyramid.variance is None else pyramid.variance[b, h],
            covariance=None if pyramid.covariance is None else pyramid.covariance[b, h],
            scale=scale,
        )
        ids, offsets = schedule.block_ids[b, h].long(), schedule.offsets[b, h].long()
        is_full = offsets[:, 1] == layout.num_key_blocks
        _attend_full(out[b, h], q[b, h], head, layout, is_full)
        counts = torch.where(is_full[:, None], 0, offsets.diff(dim=1))
        units = _list_units(ids, offsets, counts)
        for group, most in _groups(counts.tolist(), [table.shape[1] for table in tables]):
            blocks = torch.tensor(group, device=q.device)
            index = [
                table.index_select(0, unit[:, :count].index_select(0, blocks).flatten()).view(len(blocks), -1)
                for table, unit, count in zip(tables, units, most, strict=True)
            ]
            _attend_group(out[b, h], q[b, h], head, layout, blocks, index)
    return out


@dataclass(frozen=True, eq=False)
class _Head:
    """What the query blocks of one head read.

    Attributes:
        keys: Tokens ``[L, D]`` and pooled cells ``[P, D]``.
        values: The same.
        log_counts: ``[P]`` log of the tokens of a pooled cell.
        variance: ``[P]`` key variance, or None.
        covariance: ``[F, D, D]`` covariance of keys and values within cells, or None.
        scale: Softmax scale.
    """

    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    log_counts: Tensor
    variance: Tensor | None
    covariance: Tensor | None
    scale: float


def _attend_full(out: Tensor, q: Tensor, head: _Head, layout: Layout, is_full: Tensor) -> None:
    """Query blocks that read every key at factor 1: keys and values are read where they stand."""
    rows = layout.query_rows.view(-1, layout.block_m)[is_full].flatten()
    rows = rows[rows >= 0].long()
    if len(rows):
        query, key, value = (x[None, None] for x in (q.index_select(0, rows), head.keys[0], head.values[0]))
        out.index_copy_(0, rows, F.scaled_dot_product_attention(query, key, value, scale=head.scale)[0, 0])


def _attend_group(out: Tensor, q: Tensor, head: _Head, layout: Layout, blocks: Tensor, index: list[Tensor]) -> None:
    """Query blocks ``[G]`` that read the cells ``index``: at each factor ``[G, slots]`` rows, -1 for padding."""
    wide = head.log_counts.dtype
    rows = layout.query_rows.view(-1, layout.block_m).index_select(0, blocks)
    lanes = rows >= 0
    query = _take(q, rows.clamp_min(0))

    tokens, pooled = index[0], torch.cat([index[0][:, :0], *index[1:]], 1)
    is_cell = torch.cat([tokens, pooled], 1) >= 0
    tokens, pooled = _fill(tokens), _fill(pooled)
    bias = _take(head.log_counts, pooled)
    if head.variance is not None:
        norm = query.to(wide).square().sum(-1) * lanes
        norm = torch.where(torch.isfinite(norm), norm, 0).sum(1, keepdim=True) / lanes.sum(1, keepdim=True)
        spread = _take(head.variance, pooled)
        spread = torch.where(torch.isfinite(spread), spread, 0)
        bias = bias + (0.5 * head.scale**2 * norm * spread).clamp_max(KEY_VARIANCE_CAP)
    bias = torch.where(is_cell, torch.cat([bias.new_zeros(tokens.shape), bias], 1), -torch.inf)

    channels = None
    if head.covariance is not None and len(index) > 1:
        channels = factor_channels([rows.shape[1] for rows in index], query)
    step = max(1, _GATHERED // (bias.shape[1] * q.shape[1]))
    rooms = [_make_room(sources, min(step, len(blocks)) * bias.shape[1]) for sources in (head.keys, head.values)]
    parts = zip(*(x.split(step) for x in (query, tokens, pooled, bias)), strict=True)
    read = torch.cat([_read(head, part, channels, rooms) for part in parts])
    result = read[..., : q.shape[1]]
    if head.covariance is not None and channels is not None:
        result = result + head.scale * _tilt(query, read[..., q.shape[1] :], head.covariance)
    result = result.to(out.dtype)
    if lanes.all():
        out.index_copy_(0, rows.flatten().long(), result.flatten(0, 1))
    else:
        out.index_copy_(0, rows[lanes].long(), result[lanes])


def _read(head: _Head, part: tuple[Tensor, ...], channels: Tensor | None, rooms: list[Tensor | None]) -> Tensor:
    """Attention of some query blocks: their queries ``[G, m, D]``, rows of tokens and of pooled cells, and the bias."""
    query, tokens, pooled, bias = part
    # only the CPU's SDPA takes a float32 bias beside half-precision queries
    work = query.dtype if query.is_cpu else bias.dtype
    rows = tokens.T.flatten(), pooled.T.flatten()
    key, value = (
        _gather(sources, rows, room).view(bias.shape[1], len(bias), -1).transpose(0, 1).to(work)
        for sources, room in zip((head.keys, head.values), rooms, strict=True)
    )
    if channels is not None:
        query, key = (F.pad(x, (0, channels.shape[1])) for x in (query, key))
        value = torch.cat([value, channels.to(work).expand(len(value), -1, -1)], 2)
    mask = bias[:, None, None].expand(-1, 1, query.shape[1], -1)
    query, key, value = (x[:, None] for x in (query.to(work), key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=head.scale)[:, 0]


def _make_room(sources: tuple[Tensor, ...], rows: int) -> Tensor | None:
    """A buffer to gather into, again and again; None where a gradient is due, which needs its own copies."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        return None
    return sources[0].new_empty(rows, sources[0].shape[1])


def _gather(sources: tuple[Tensor, ...], rows: tuple[Tensor, ...], room: Tensor | None) -> Tensor:
    """Rows of the first source, then of the second."""
    if room is None:
        return torch.cat([x.index_select(0, index) for x, index in zip(sources, rows, strict=True)])
    filled = 0
    for x, index in zip(sources, rows, strict=True):
        torch.index_select(x, 0, index, out=room[filled : filled + len(index)])
        filled += len(index)
    return room[:filled]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, which copies whole rows instead of numbers: several times faster on a CPU."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def _fill(index: Tensor) -> Tensor:
    """Let padding repeat a cell of its row, at weight zero: a cell that is not read must not matter, NaN or not."""
    return torch.where(index < 0, index.amax(1, keepdim=True), index) if index.shape[1] else index


def _row_tables(pyramid: Pyramid, layout: Layout) -> list[Tensor]:
    """For each factor the rows of every block's cells ``[N + 1, block_n / factor]`` int32, -1 for an empty cell.

    Rows of k and v at factor 1, rows of the pyramid otherwise. Block N stands for none.
    """
    tables = []
    for factor, base in zip(pyramid.factors, pyramid.bases, strict=True):
        rows = layout.key_rows
        if factor > 1:
            counts = layout.cell_counts(factor)
            places = torch.arange(base, base + len(counts), dtype=rows.dtype, device=rows.device)
            rows = torch.where(counts > 0, places, -1)
        tables.append(F.pad(rows.view(layout.num_key_blocks, -1), (0, 0, 0, 1), value=-1))
    return tables


def _list_units(ids: Tensor, offsets: Tensor, counts: Tensor) -> list[Tensor]:
    """For each factor the key blocks that a query block reads at it ``[M, most]``, and N after the last one."""
    units = []
    for f, most in enumerate(counts.amax(0).tolist()):
        slot = torch.arange(most, device=ids.device)
        listed = ids.gather(1, (offsets[:, f, None] + slot).clamp_max(ids.shape[1] - 1))
        units.append(torch.where(slot < counts[:, f, None], listed, ids.shape[1]))
    return units


def _groups(counts: list[list[int]], widths: list[int]) -> list[tuple[list[int], list[int]]]:
    """Put together query blocks that read about as many cells, so that little padding makes them equal.

    Args:
        counts: Key blocks that each query block reads at each factor.
        widths: Cells of a key block at each factor.

    Returns:
        Query blocks, and to how many key blocks at each factor they are padded. Blocks that read nothing are left out.
    """

    def cells(count: list[int]) -> int:
        return sum(number * width for number, width in zip(count, widths, strict=True))

    def kind(block: int) -> tuple[bool, bool]:
        return counts[block][0] > 0, any(counts[block][1:])  # padding repeats what is read: it needs some of each kind

    groups: list[tuple[list[int], list[int]]] = []
    for block in sorted(range(len(counts)), key=lambda block: (kind(block), cells(counts[block])), reverse=True):
        if not any(counts[block]):
            continue
        if groups and kind(block) == kind(groups[-1][0][0]):
            blocks, most = groups[-1]
            wider = [max(pair) for pair in zip(most, counts[block], strict=True)]
            if (len(blocks) + 1) * cells(wider) <= _LISTED and cells(wider) < 2 * cells(counts[block]):
                groups[-1] = [*blocks, block], wider
                continue
        groups.append(([block], counts[block]))
    return groups


def factor_channels(cells: list[int], like: Tensor) -> Tensor:
    """``[all cells, channels]``: 1 in channel f for cells of pooled factor f, so that attention sums their weights.

    Args:
        cells: How many cells there are at each factor, those of factor 1 first.
        like: Of which dtype and device.
    """
    channels = like.new_zeros(sum(cells), -(-(len(cells) - 1) // 8) * 8)
    start = cells[0]
    for f, size in enumerate(cells[1:]):
        channels[start : start + size, f] = 1
        start += size
    return channels


def _tilt(query: Tensor, shares: Tensor, covariances: Tensor) -> Tensor:
    """q_r . sum over pooled factors of share x covariance: ``[G, m, D]``."""
    wide = covariances.dtype
    total = torch.zeros_like(query, dtype=wide)
    for f, covariance in enumerate(covariances[1:]):
        share = shares[..., f : f + 1].to(wide)
        # a head of NaN values has a NaN covariance: it counts only where the factor was read
        total += torch.where(share > 0, share * (query.to(wide) @ covariance), 0)
    return total
