"""What follows from the preset and the token grid alone: token order, segments, blocks. Made once a resolution."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from psa_diffusers.ops.orders import video_order


@dataclass(frozen=True, eq=False)
class Layout:
    """Where every token stands, as the other stages read it.

    Tokens are put in order, video first and text last; each of the two segments starts a new block. Real tokens stand
    at the front of a block, so the last block of a segment may have empty lanes at its end.

    Attributes:
        grid: ``(frames, height, width)`` of the video, in tokens.
        text_tokens: Number of text tokens.
        block_m: Lanes of a query block.
        block_n: Lanes of a key block.
        query_rows: ``[M * block_m]`` int32, source token of each lane of each query block, ``-1`` for an empty lane.
        key_rows: ``[N * block_n]`` int32, the same for keys.
        query_counts: ``[M]`` int32, real tokens of each query block.
        key_counts: ``[N]`` int32, real tokens of each key block.
        video_query_blocks: The first this many query blocks are video, the rest text.
        video_key_blocks: The same for key blocks.
    """

    grid: tuple[int, int, int]
    text_tokens: int
    block_m: int
    block_n: int
    query_rows: Tensor
    key_rows: Tensor
    query_counts: Tensor
    key_counts: Tensor
    video_query_blocks: int
    video_key_blocks: int

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width + self.text_tokens

    @property
    def num_query_blocks(self) -> int:
        return self.query_counts.shape[0]

    @property
    def num_key_blocks(self) -> int:
        return self.key_counts.shape[0]

    @cached_property
    def _cell_counts(self) -> dict[int, Tensor]:
        return {}

    def cell_counts(self, factor: int) -> Tensor:
        """Real tokens of each cell at a pooling factor: ``[N * block_n / factor]`` int32."""
        if factor not in self._cell_counts:
            lanes = (self.key_rows >= 0).view(-1, factor)
            self._cell_counts[factor] = lanes.sum(1, dtype=torch.int32)
        return self._cell_counts[factor]


def make_layout(
    grid: tuple[int, int, int],
    text_tokens: int,
    text_first: bool,
    block_m: int,
    block_n: int,
    order: str,
    tile_size: tuple[int, ...],
    device: torch.device,
) -> Layout:
    """Lay out one resolution; cached, so that all layers and steps of a video share one layout.

    Args:
        grid: ``(frames, height, width)`` in tokens.
        text_tokens: Text tokens in the same sequence; ``0`` where text enters through cross-attention.
        text_first: Whether the model puts the text tokens before the video tokens. In the layout text is always last.
        block_m: Tokens of a query block.
        block_n: Tokens of a key block, a power of two.
        order: Order of the video tokens, one of `psa_diffusers.ops.orders.ORDERS`.
        tile_size: Tokens of a tile ``(frames, height, width)``, for the order ``tiles``.
        device: Where the index tensors live.
    """
    return _make_layout(
        tuple(grid), text_tokens, text_first, block_m, block_n, order, tuple(tile_size), torch.device(device)
    )


@lru_cache(maxsize=32)
def _make_layout(grid, text_tokens, text_first, block_m, block_n, order, tile_size, device) -> Layout:
    video_tokens = grid[0] * grid[1] * grid[2]
    video = video_order(grid, order, tile_size) + (text_tokens if text_first else 0)
    text = torch.arange(text_tokens) + (0 if text_first else video_tokens)
    query_rows, query_counts = _cut_blocks((video, text), block_m)
    key_rows, key_counts = _cut_blocks((video, text), block_n)
    return Layout(
        grid=grid,
        text_tokens=text_tokens,
        block_m=block_m,
        block_n=block_n,
        query_rows=query_rows.to(device),
        key_rows=key_rows.to(device),
        query_counts=query_counts.to(device),
        key_counts=key_counts.to(device),
        video_query_blocks=-(-video_tokens // block_m),
        video_key_blocks=-(-video_tokens // block_n),
    )


def flat_layout(tokens: int, block_m: int, block_n: int, device: torch.device) -> Layout:
    """Tokens as they stand, one segment: the layout of `pyramid_attention`."""
    return make_layout((1, 1, tokens), 0, False, block_m, block_n, "raster", (1, 1, 1), device)


def _cut_blocks(segments: tuple[Tensor, ...], block: int) -> tuple[Tensor, Tensor]:
    """Pad every segment to whole blocks with -1: ``[blocks * block]`` rows and ``[blocks]`` counts, int32."""
    rows = torch.cat([torch.nn.functional.pad(s, (0, -len(s) % block), value=-1) for s in segments]).int()
    return rows, (rows.view(-1, block) >= 0).sum(1, dtype=torch.int32)
