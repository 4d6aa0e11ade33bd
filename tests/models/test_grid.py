"""Reading a token grid from what a denoiser is given."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_diffusers.models.grid import find_grid
from psa_diffusers.models.registry import read_latents


def positions(frames, height, width, times):
    grid = torch.meshgrid(torch.tensor(times), torch.arange(height) * 32.0, torch.arange(width) * 32.0, indexing="ij")
    return torch.stack(grid).reshape(3, frames * height * width)


@given(
    st.tuples(*(st.integers(1, 5),) * 3),
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 30)), max_size=3),
)
def test_the_grid_is_found_behind_any_keyframes(grid, keyframes):
    frames, height, width = grid
    times = [0.0, *(1.0 + 8 * frame for frame in range(frames - 1))]  # as LTX-Video counts: the first frame is short
    before = [positions(count, height, width, [at + i * 8.0 for i in range(count)]) for count, at in keyframes]
    coordinates = torch.cat([*before, positions(frames, height, width, times)], dim=1)
    assert find_grid(coordinates).grid == grid


def test_tokens_before_the_grid_may_be_of_any_size():
    small = positions(1, 2, 2, [40.0])
    assert find_grid(torch.cat([small, positions(3, 4, 5, [0.0, 1.0, 9.0])], dim=1)).grid == (3, 4, 5)


@pytest.mark.parametrize(
    ("patch", "shape", "grid"),
    [
        ({"patch_size": (1, 2, 2)}, (2, 16, 3, 8, 10), (3, 4, 5)),
        ({"patch_size": 2, "patch_size_t": None}, (1, 16, 3, 8, 10), (3, 4, 5)),
        ({"patch_size": 2, "patch_size_t": 2}, (1, 16, 4, 8, 10), (2, 4, 5)),
        ({"patch_size": 1}, (1, 16, 3, 8, 10), (3, 8, 10)),
        ({"patch_size": 1}, (1, 240, 16), None),
    ],
)
def test_latents_are_read_in_patches(patch, shape, grid):
    assert read_latents(SimpleNamespace(**patch), {"hidden_states": torch.empty(shape)}) == grid


def test_without_latents_there_is_no_grid():
    assert read_latents(SimpleNamespace(patch_size=2), {}) is None
