"""Orders in which the tokens of a video can stand, so that consecutive tokens are close in space and time."""

from collections.abc import Iterator

import torch
from torch import Tensor

# boxes of 4 x 8 x 4 tokens, halved again and again: height, frames, height, width, height, frames, width
_BOX = (4, 8, 4)
_BOX_BITS = ((1, 2), (0, 1), (1, 1), (2, 1), (1, 0), (0, 0), (2, 0))

ORDERS = ("raster", "gilbert", "tiles", "boxes")


def video_order(grid: tuple[int, int, int], order: str, tile_size: tuple[int, int, int] = (2, 8, 8)) -> Tensor:
    """List the tokens of a video in the given order.

    Args:
        grid: ``(frames, height, width)`` in tokens; any positive sizes.
        order: ``raster`` (as diffusers lays tokens out), ``gilbert`` (a Hilbert curve for any cuboid), ``tiles``
            (raster of small raster tiles) or ``boxes`` (boxes of 4 x 8 x 4 tokens, halved hierarchically inside).
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
    return tuple(moved)
