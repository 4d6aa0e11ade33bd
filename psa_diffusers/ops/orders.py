"""Orders in which the tokens of a video can stand, so that consecutive tokens are close in space and time."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# boxes of 4 x 8 x 4 tokens, halved again and again: height, frames, height, width, height, frames, width
_BOX = (4, 8, 4)
_BOX_TOKENS = 128
_BOX_BITS = ((1, 2), (0, 1), (1, 1), (2, 1), (1, 0), (0, 0), (2, 0))

ORDERS = ("raster", "gilbert", "tiles", "boxes")


def video_order(grid: tuple[int, int, int], order: str, tile_size: tuple[int, int, int] = (2, 8, 8)) -> Tensor:
    """List the tokens of a video in the given order.

    Args:
        grid: ``(frames, height, width)`` in tokens; any positive sizes.
        order: ``raster`` (as diffusers lays tokens out), ``gilbert`` (a Hilbert curve for any cuboid), ``tiles``
            (raster of small raster tiles) or ``boxes`` (compact boxes of 128 tokens, halved hierarchically inside).
        tile_size: Tokens of a tile ``(frames, height, width)``; used by ``tiles`` only.

    Returns:
        ``[frames * height * width]`` int64; entry ``p`` is the raster index of the token that stands at place ``p``.

    Raises:
        ValueError: For an order that does not exist.

    Source: reordering of arXiv:2512.04025, section 3 (Hilbert order); the generalised curve after J. Cerveny's
        "gilbert" construction. ``boxes`` is ours.
    """
    frames, height, width = grid
    if order == "raster":
        return torch.arange(frames * height * width)
    if order == "gilbert":
        points = torch.tensor(list(_gilbert(grid)))
        return (points[:, 0] * height + points[:, 1]) * width + points[:, 2]
    place = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    if order == "tiles":
        return _sort_nested(place, grid, tile_size, inside=_raster_inside(place, tile_size))
    if order == "boxes" and any(size % box for size, box in zip(grid, _BOX, strict=True)):
        return _ragged_boxes(place, grid)
    if order == "boxes":
        inside = torch.zeros_like(place[0])
        for axis, bit in _BOX_BITS:
            inside = inside * 2 + (place[axis] % _BOX[axis] >> bit & 1)
        return _sort_nested(place, grid, _BOX, inside=inside)
    raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


def _raster_inside(place: tuple[Tensor, ...], tile: tuple[int, int, int]) -> Tensor:
    t, y, x = (p % size for p, size in zip(place, tile, strict=True))
    return (t * tile[1] + y) * tile[2] + x


def _sort_nested(
    place: tuple[Tensor, ...], grid: tuple[int, int, int], tile: tuple[int, int, int], *, inside: Tensor
) -> Tensor:
    """Sort by tile (raster of tiles), then by the key ``inside`` the tile."""
    t, y, x = (p // size for p, size in zip(place, tile, strict=True))
    rows, columns = -(-grid[1] // tile[1]), -(-grid[2] // tile[2])
    outer = (t * rows + y) * columns + x
    return (outer * tile[0] * tile[1] * tile[2] + inside).flatten().argsort(stable=True)


def _ragged_boxes(place: tuple[Tensor, ...], grid: tuple[int, int, int]) -> Tensor:
    """Boxes of 128 tokens for a grid that does not divide by them: no box is short but the last.

    Boxes cut off at the border would shift the blocks behind them, which are cut at every 128th token. So the video is
    cut by counting, not by coordinates: into slabs of frames, those into bars of rows, those into boxes of columns. A
    plane of tokens that a cut falls in is shared by its two sides. Of several divisions the one with the most compact
    boxes wins.
    """
    points = torch.stack(place, -1).reshape(-1, 3)
    orders = [_cut_in_boxes(points, slabs, bars) for slabs, bars in _divisions(grid)]
    return _halve(min(orders, key=lambda order: _spread(points[order])), points)


def _divisions(grid: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    """Numbers of slabs, and of bars in a slab, that make boxes of nearly equal edges."""
    frames, height, width = grid
    for slabs in _around(frames / _equal_edge(_BOX_TOKENS, grid)):
        for bars in _around(height / _equal_edge(_BOX_TOKENS * slabs / frames, (height, width))):
            yield slabs, bars


def _equal_edge(tokens: float, sizes: tuple[int, ...]) -> float:
    """Edge of the most equal-sided box of so many tokens along the first axis, no edge longer than its axis."""
    for place, size in enumerate(sorted(sizes)):
        edge = tokens ** (1 / (len(sizes) - place))
        if size >= edge or size == sizes[0]:
            return min(edge, size)
        tokens /= size
    return sizes[0]


def _around(count: float) -> range:
    return range(max(1, round(count) - 1), round(count) + 2)


def _cut_in_boxes(points: Tensor, slabs: int, bars: int) -> Tensor:
    """Order of the tokens ``[L]`` in which every run of 128 is a box."""
    frame, row, column = points.unbind(1)
    boxes = -(-len(points) // _BOX_TOKENS)
    slab_ends = [boxes * slab // slabs for slab in range(slabs + 1)]
    slab = _cut(_sorted_by(frame, row, column), slab_ends)
    bar_ends = [0]
    for start, stop in pairwise(slab_ends):
        bar_ends += [start + (stop - start) * (bar + 1) // bars for bar in range(bars)]
    bar = _cut(_sorted_by(slab, row, frame, column), bar_ends)
    return _sorted_by(bar, column, row, frame)


def _cut(order: Tensor, ends: list[int]) -> Tensor:
    """Number of the piece of each token, when pieces of the order end after so many boxes: ``[L]``."""
    piece = torch.empty_like(order)
    inner = torch.tensor(ends[1:-1], dtype=torch.long) * _BOX_TOKENS
    piece[order] = torch.searchsorted(inner, torch.arange(len(order)), right=True)
    return piece


def _sorted_by(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key, equal ones by the next."""
    joined = torch.zeros_like(keys[0])
    for key in keys:
        joined = joined * (int(key.max()) + 1) + key
    return joined.argsort(dim=-1, stable=True)


def _spread(points: Tensor) -> float:
    """Mean squared distance of tokens to the middle of their run of 128."""
    points = points[: max(len(points) // _BOX_TOKENS, 1) * _BOX_TOKENS].float()
    runs = points.view(-1, min(_BOX_TOKENS, len(points)), 3)
    return float((runs - runs.mean(1, keepdim=True)).square().sum(-1).mean())


def _halve(order: Tensor, points: Tensor) -> Tensor:
    """Inside each run of 128, put the halves across the longest edge one behind the other; again inside the halves."""
    lanes = torch.nn.functional.pad(order, (0, -len(order) % _BOX_TOKENS), value=-1)
    largest = int(points.max()) + 1
    size = _BOX_TOKENS
    while size > 1:
        lanes = lanes.view(-1, size)
        empty = (lanes < 0)[..., None]
        place = points[lanes.clamp_min(0)]
        edges = place.masked_fill(empty, -1).amax(1) - place.masked_fill(empty, largest).amin(1)
        longest_first = edges.argsort(dim=1, descending=True, stable=True)  # of equal edges, frames first
        keys = place.gather(2, longest_first[:, None].expand(-1, size, 3)).masked_fill(empty, largest)
        joined = (keys[..., 0] * (largest + 1) + keys[..., 1]) * (largest + 1) + keys[..., 2]
        lanes = lanes.gather(1, joined.argsort(dim=1, stable=True))
        size //= 2
    lanes = lanes.flatten()
    return lanes[lanes >= 0]


# An edge of a box is (axis, signed length): every edge is parallel to an axis.
_Edge = tuple[int, int]


def _gilbert(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Walk a cuboid so that successive points are neighbours, but for rare short jumps that odd sizes force."""
    longest_first = sorted(range(3), key=lambda axis: (-grid[axis], -axis))
    a, b, c = ((axis, grid[axis]) for axis in longest_first)
    yield from _walk((0, 0, 0), a, b, c)


def _walk(start: tuple[int, int, int], a: _Edge, b: _Edge, c: _Edge) -> Iterator[tuple[int, int, int]]:
    """Fill the box spanned by three edges, from ``start`` to the far end of ``a``."""
    w, h, d = abs(a[1]), abs(b[1]), abs(c[1])
    if 0 in (w, h, d):
        return
    if (w == 1) + (h == 1) + (d == 1) >= 2:
        line = a if w > 1 else b if h > 1 else c
        step = (line[0], _sign(line))
        for _ in range(abs(line[1])):
            yield start
            start = _move(start, step)
        return
    a1, b1, c1 = _half(a), _half(b), _half(c)
    a2, b2, c2 = _rest(a, a1), _rest(b, b1), _rest(c, c1)
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes, one behind the other
        yield from _walk(start, a1, b, c)
        yield from _walk(_move(start, a1), a2, b, c)
    elif 3 * h > 4 * d:  # flat: c stays whole
        yield from _walk(start, b1, c, a1)
        yield from _walk(_move(start, b1), a, b2, c)
        yield from _walk(_move(start, _last(a), _last(b1)), _back(b1), c, _back(a2))
    elif 3 * d > 4 * h:  # flat: b stays whole
        yield from _walk(start, c1, a1, b)
        yield from _walk(_move(start, c1), a, b, c2)
        yield from _walk(_move(start, _last(a), _last(c1)), _back(c1), _back(a2), b)
    else:  # near-cubic: all three edges are cut
        yield from _walk(start, b1, c1, a1)
        yield from _walk(_move(start, b1), c, a1, b2)
        yield from _walk(_move(start, _last(b1), _last(c)), a, _back(b1), _back(c2))
        yield from _walk(_move(start, _last(a), b1, _last(c)), _back(c), _back(a2), b2)
        yield from _walk(_move(start, _last(a), _last(b1)), _back(b1), c1, _back(a2))


def _sign(edge: _Edge) -> int:
    return 1 if edge[1] > 0 else -1


def _half(edge: _Edge) -> _Edge:
    """The nearer half of an edge, of even length where the edge allows it: even boxes end where the next one starts."""
    half = edge[1] // 2
    return edge[0], half + _sign(edge) if half % 2 and abs(edge[1]) > 2 else half


def _rest(edge: _Edge, half: _Edge) -> _Edge:
    return edge[0], edge[1] - half[1]


def _last(edge: _Edge) -> _Edge:
    """From the first to the last point along an edge."""
    return edge[0], edge[1] - _sign(edge)


def _back(edge: _Edge) -> _Edge:
    return edge[0], -edge[1]


def _move(point: tuple[int, int, int], *edges: _Edge) -> tuple[int, int, int]:
    moved = list(point)
    for axis, length in edges:
        moved[axis] += length
    return moved[0], moved[1], moved[2]
