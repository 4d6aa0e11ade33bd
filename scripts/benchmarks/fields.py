"""Synthetic queries, keys and values on a token grid, for judging a choice of levels where no trained model is at hand.

White noise makes every sparse attention look bad: its softmax is flat. The fields here are correlated over frames, rows
and columns, carry a 3-D rotary embedding, and range from diffuse to peaked attention.

``A``-``D``: smooth random content shared by queries and keys, a direction common to all tokens, and noise; values are
another smooth field. ``E``-``H``: the same, but the values are a linear map of the keys' content, so that keys which
score higher also carry other values. ``I``-``L``, of other kinds: textures that move, so that attention follows
trajectories (``I``, ``J``), and peaked attention with hardly any spatial order (``K``, ``L``).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """Parameters of one field.

    Args:
        sharp: Scale of the queries: how peaked attention is.
        common: Size of the direction that all tokens share.
        noise: Size of the white noise in queries and keys.
        values_follow: Whether values are a linear map of the keys' content.
        kind: ``smooth``, ``moving`` or ``scattered`` content.
    """

    sharp: float
    common: float
    noise: float
    values_follow: bool
    kind: str = "smooth"


FIELDS = {
    "A": Field(1.0, 0.7, 0.3, False),
    "B": Field(2.0, 0.3, 0.3, False),
    "C": Field(3.0, 0.1, 0.3, False),
    "D": Field(0.6, 0.7, 0.6, False),
    "E": Field(1.0, 0.7, 0.3, True),
    "F": Field(2.0, 0.3, 0.3, True),
    "G": Field(3.0, 0.1, 0.3, True),
    "H": Field(0.6, 0.7, 0.6, True),
    "I": Field(1.5, 0.3, 0.3, False, "moving"),
    "J": Field(1.5, 0.3, 0.3, True, "moving"),
    "K": Field(1.5, 0.3, 0.3, False, "scattered"),
    "L": Field(1.5, 0.3, 0.3, True, "scattered"),
}


def make_field(
    name: str, grid: tuple[int, int, int], dim: int, *, text_tokens: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one head of a field.

    Args:
        name: A key of `FIELDS`.
        grid: ``(frames, height, width)`` in tokens.
        dim: Channels of the head.
        text_tokens: White-noise tokens in front of the video.
        seed: Seed of a generator of its own.

    Returns:
        q, k, v ``[1, 1, text_tokens + frames * height * width, dim]`` float32, the video in raster order.

    Raises:
        ValueError: For a field that does not exist.
    """
    if name not in FIELDS:
        raise ValueError(f"field must be one of {', '.join(FIELDS)}, got {name!r}")
    field = FIELDS[name]
    rng = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1] * grid[2]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    content = {"smooth": _smooth, "moving": _moving, "scattered": _scattered}[field.kind](grid, dim, noise)
    shared = content + field.common * noise(1, dim)
    q = field.sharp * (shared + field.noise * noise(tokens, dim))
    k = shared + field.noise * noise(tokens, dim)
    if field.values_follow:
        v = k @ (noise(dim, dim) / dim**0.5) + 0.3 * noise(tokens, dim)
    else:
        v = _smooth(grid, dim, noise) + 0.5 * noise(tokens, dim)
    q, k = (_rotate(x, grid) for x in (q, k))
    if text_tokens:
        q, k, v = (torch.cat([noise(text_tokens, dim), x]) for x in (q, k, v))
    return q[None, None], k[None, None], v[None, None]


def _smooth(grid, dim: int, noise) -> Tensor:
    """Noise on a grid 3 x 4 x 4 times coarser, interpolated: ``[tokens, dim]``."""
    coarse = noise(1, dim, max(grid[0] // 3, 2), grid[1] // 4 + 1, grid[2] // 4 + 1)
    return F.interpolate(coarse, size=grid, mode="trilinear", align_corners=True)[0].flatten(1).T


def _moving(grid, dim: int, noise) -> Tensor:
    """Two textures that slide over each other: a background, and discs in front of it with a velocity of their own."""
    height, width = grid[1:]
    t, y, x = torch.meshgrid(*(torch.arange(size).float() for size in grid), indexing="ij")
    background, front = (_texture(height, width, dim, noise) for _ in range(2))
    velocity = noise(2, 2)
    content = _read_texture(background, y - velocity[0, 0] * t, x - velocity[0, 1] * t)
    for _ in range(3):
        place = (noise(2).tanh() + 1) / 2
        speed = 1.5 * noise(2)
        dy, dx = (y - place[0] * height - speed[0] * t), (x - place[1] * width - speed[1] * t)
        dy, dx = (dy + height / 2) % height - height / 2, (dx + width / 2) % width - width / 2
        inside = (dy.square() + dx.square()).sqrt() < min(height, width) / 5
        content = torch.where(inside[..., None], _read_texture(front, dy, dx), content)
    return content.reshape(-1, dim)


def _texture(height: int, width: int, dim: int, noise) -> Tensor:
    """Periodic texture with coarse and fine detail: ``[dim, height, width]``."""
    coarse = F.interpolate(noise(1, dim, height // 4 + 2, width // 4 + 2), size=(height, width), mode="bicubic")
    return coarse[0] + 0.5 * noise(dim, height, width)


def _read_texture(texture: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear look-up with wrap-around: ``[..., dim]``."""
    height, width = texture.shape[1:]
    y0, x0 = y.floor(), x.floor()
    total = 0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - (y - y0 - dy).abs()) * (1 - (x - x0 - dx).abs())
            total = total + weight[..., None] * texture[:, (y0 + dy).long() % height, (x0 + dx).long() % width].movedim(
                0, -1
            )
    return total


def _scattered(grid, dim: int, noise) -> Tensor:
    """Every token belongs to one of 64 kinds, nearly regardless of where it is: ``[tokens, dim]``."""
    kinds, tokens = 64, grid[0] * grid[1] * grid[2]
    where = 0.5 * _smooth(grid, kinds, noise) + noise(tokens, kinds)
    return noise(kinds, dim)[where.argmax(1)]


def _rotate(x: Tensor, grid) -> Tensor:
    """3-D rotary embedding: a quarter of the channels for frames, three eighths each for rows and columns."""
    dim = x.shape[1]
    places = torch.meshgrid(*(torch.arange(size).float() for size in grid), indexing="ij")
    parts, start = [], 0
    for place, share in zip(places, (2, 3, 3), strict=True):
        size = share * dim // 16 * 2
        angle = place.reshape(-1, 1) * 10000 ** -(torch.arange(0, size, 2) / size)
        even, odd = x[:, start : start + size : 2], x[:, start + 1 : start + size : 2]
        turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
        parts.append(torch.stack(turned, -1).flatten(1))
        start += size
    return torch.cat([*parts, x[:, start:]], 1)
