"""What the estimator of our presets costs, counted in operations, and that it depends on nothing but its input."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from psa_diffusers import load_preset
from psa_diffusers.ops.layout import make_layout
from psa_diffusers.ops.reference import block_importance
from psa_diffusers.ops.reference.tilt import tilt_gain

SHAPES = [
    pytest.param((13, 30, 45), 226, 64, id="CogVideoX-5B-480p"),
    pytest.param((21, 30, 52), 0, 128, id="Wan2.1-480p"),
]
MOVES = ("index_select", "gather", "clone", "copy", "_to_copy", "cat", "constant_pad_nd", "zeros", "empty", "new_empty")


class CountElements(TorchDispatchMode):
    """Counts an operation for every number that an operator reads or makes, the larger of the two.

    Products of matrices are left to FlopCounterMode; views and copies compute nothing.
    """

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.arguments)
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not is_view:
            if name not in MOVES and not name.endswith("mm"):
                self.operations += max(x.numel() for x in tensors)
        return out


def count(run):
    """Operations of a call: multiplications and additions of matrix products, and everything else."""
    with FlopCounterMode(display=False) as products:
        run()
    with CountElements() as elements:
        run()
    return products.get_total_flops() + elements.operations


def random_heads(grid, text, dim, heads=1):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, math.prod(grid) + text, dim, generator=rng) for _ in range(3)]


def layout_of(grid, text, preset, device):
    return make_layout(grid, text, True, preset.block_m, preset.block_n, preset.order, preset.tile_size, device)


def test_the_count_is_right():
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    assert count(lambda: a @ b) == 2 * 20 * 30 * 40
    assert count(lambda: (a @ b).exp().sum(1)) == 2 * 20 * 30 * 40 + 2 * 20 * 40
    assert count(lambda: a.t()[:, 3:].view(-1, 17)) == 0
    assert count(lambda: a + a[0]) == 20 * 30


@pytest.mark.parametrize(("grid", "text", "dim"), SHAPES)
def test_estimating_importance_costs_at_most_a_two_hundredth_of_the_scores(grid, text, dim):
    q, k, v = random_heads(grid, text, dim)
    scores = 2 * q.shape[2] ** 2 * dim
    preset = load_preset("default", "psa_cover").for_video(math.prod(grid))
    layout = layout_of(grid, text, preset, q.device)
    assert preset.importance == "pooled_moments"
    assert count(lambda: block_importance(q, k, layout, preset.importance, dim**-0.5)) <= scores / 200
    assert count(lambda: tilt_gain(q, k, v, layout, dim**-0.5)) <= scores / 1000


def test_planning_depends_on_nothing_but_its_input():
    grid, text = (5, 12, 17), 9
    q, k, v = random_heads(grid, text, 32, heads=2)
    preset = load_preset("default", "psa_cover").for_video(math.prod(grid))
    layout = layout_of(grid, text, preset, q.device)
    state = torch.random.get_rng_state()
    first, second = (
        (block_importance(q, k, layout, "pooled_moments", 0.2), tilt_gain(q, k, v, layout, 0.2)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not touched"
    one = block_importance(q[:, 1:], k[:, 1:], layout, "pooled_moments", 0.2)
    torch.testing.assert_close(one, first[0][:, 1:])
