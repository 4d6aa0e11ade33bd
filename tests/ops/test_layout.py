"""Token orders and blocks, for any grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers.ops.layout import make_layout
from psa_diffusers.ops.orders import ORDERS, video_order

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(GRIDS, st.sampled_from(ORDERS))
def test_every_order_names_every_token_once(grid, order):
    tokens = video_order(grid, order)
    assert sorted(tokens.tolist()) == list(range(grid[0] * grid[1] * grid[2]))


def steps(grid, order):
    tokens = video_order(grid, order)
    place = torch.stack([tokens // (grid[1] * grid[2]), tokens // grid[2] % grid[1], tokens % grid[2]], 1)
    return place.diff(dim=0).abs()


@pytest.mark.parametrize("grid", [(4, 8, 8), (8, 4, 16), (2, 2, 2), (16, 16, 16)])
def test_gilbert_walks_from_neighbour_to_neighbour_on_even_grids(grid):
    assert (steps(grid, "gilbert").sum(1) == 1).all()


@pytest.mark.parametrize("grid", [(13, 30, 45), (5, 9, 11), (21, 30, 52)])
def test_gilbert_jumps_are_few_and_short_on_odd_grids(grid):
    jump = steps(grid, "gilbert").amax(1)
    assert jump.max() <= 3
    assert (jump > 1).float().mean() < 0.02


@pytest.mark.parametrize(("order", "box"), [("boxes", (4, 8, 4)), ("tiles", (2, 8, 8))])
def test_blocks_of_128_are_the_boxes(order, box):
    tokens = video_order((8, 16, 16), order).view(-1, 128)
    place = torch.stack([tokens // 256, tokens // 16 % 16, tokens % 16], -1)
    extent = place.amax(1) - place.amin(1) + 1
    assert (extent == torch.tensor(box)).all()


def test_boxes_are_nested():
    tokens = video_order((4, 8, 4), "boxes")
    place = torch.stack([tokens // 32, tokens // 4 % 8, tokens % 4], -1)
    for size, extent in ((64, (4, 4, 4)), (32, (2, 4, 4)), (16, (2, 2, 4)), (8, (2, 2, 2))):
        cells = place.view(-1, size, 3)
        assert (cells.amax(1) - cells.amin(1) + 1 == torch.tensor(extent)).all()


RAGGED = [(13, 30, 45), (7, 19, 23), (21, 30, 52), (1, 30, 52), (400, 3, 5), (13, 24, 40), (2, 3, 300)]


def spread(grid, order, size):
    """Mean squared distance of tokens to the middle of the cell of `size` tokens they stand in."""
    tokens = video_order(grid, order)
    tokens = tokens[: len(tokens) // size * size]
    place = torch.stack([tokens // (grid[1] * grid[2]), tokens // grid[2] % grid[1], tokens % grid[2]], 1).float()
    cells = place.view(-1, size, 3)
    return float((cells - cells.mean(1, keepdim=True)).square().sum(-1).mean())


@pytest.mark.parametrize("grid", RAGGED)
def test_boxes_are_compact_on_grids_that_do_not_divide(grid):
    # a box of 4 x 8 x 4 has 7.75; boxes cut off at the border, with what follows shifted, had 46 at 13 x 30 x 45
    for size in (128, 64, 32):
        assert spread(grid, "boxes", size) <= 1.02 * spread(grid, "gilbert", size)
    if min(grid) > 4:
        assert spread(grid, "boxes", 128) < 7.75


def test_ragged_boxes_are_nested_halves():
    tokens = video_order((13, 30, 45), "boxes")[: 137 * 128]
    place = torch.stack([tokens // 1350, tokens // 45 % 30, tokens % 45], 1)
    for size in (64, 32, 16, 8, 4, 2):
        first, second = place.view(-1, 2, size, 3).unbind(1)
        apart = (first.amax(1) <= second.amin(1)).any(1)
        assert apart.all(), "a plane separates the halves of every cell"


def test_an_unknown_order_lists_the_known_ones():
    with pytest.raises(ValueError, match="raster, gilbert, tiles, boxes"):
        video_order((2, 2, 2), "hilbert")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(GRIDS, st.integers(0, 40), st.booleans(), st.sampled_from([16, 32]), st.sampled_from([16, 64]))
def test_blocks_hold_every_token_once_video_before_text(grid, text, text_first, block_m, block_n):
    layout = make_layout(grid, text, text_first, block_m, block_n, "gilbert", (2, 8, 8), torch.device("cpu"))
    video = grid[0] * grid[1] * grid[2]
    text_ids = range(text) if text_first else range(video, video + text)
    for rows, counts, block, video_blocks in (
        (layout.query_rows, layout.query_counts, block_m, layout.video_query_blocks),
        (layout.key_rows, layout.key_counts, block_n, layout.video_key_blocks),
    ):
        assert sorted(rows[rows >= 0].tolist()) == list(range(video + text)) == list(range(layout.num_tokens))
        assert set(rows[video_blocks * block :].tolist()) - {-1} == set(text_ids)
        lanes = rows.view(-1, block) >= 0
        assert torch.equal(lanes.sum(1), counts.long())
        assert (lanes.int().diff(dim=1) <= 0).all(), "real tokens stand at the front of a block"
        assert (counts > 0).all()


def test_a_layout_is_made_once_a_resolution():
    make = lambda: make_layout((3, 4, 5), 7, True, 16, 16, "gilbert", (2, 8, 8), torch.device("cpu"))  # noqa: E731
    assert make() is make()


def test_cell_counts_are_real_tokens():
    layout = make_layout((1, 1, 19), 3, False, 16, 16, "raster", (2, 8, 8), torch.device("cpu"))
    assert layout.cell_counts(8).tolist() == [8, 8, 3, 0, 3, 0]
