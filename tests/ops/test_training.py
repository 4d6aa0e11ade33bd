"""The backend that trains on a GPU against the one that is judged by the oracle."""

import oracle
import pytest
import torch
from budget import assert_within_rounding

from psa_diffusers.ops import reference, training
from psa_diffusers.ops.layout import flat_layout

CASES = [
    #             L    m    n    factors        what it is for
    pytest.param(192, 32, 32, (0, 1, 4, 32), id="aligned"),
    pytest.param(97, 32, 64, (0, 1, 2, 64), id="one-real-token-in-the-tail"),
    pytest.param(130, 64, 32, (1,), id="all-in-full"),
    pytest.param(130, 128, 128, (0,), id="nothing-read"),
]
TERMS = [pytest.param(False, False, id="plain"), pytest.param(True, True, id="both-terms")]


def both(q, k, v, factors, m, n, rng, key_variance, value_tilt):
    B, H, L, D = q.shape
    layout = flat_layout(L, m, n, q.device)
    shape = (B, H, -(-L // m), -(-L // n))
    level_map = torch.tensor(factors, dtype=torch.int16)[torch.randint(0, len(factors), shape, generator=rng)]
    factors = tuple(sorted({*factors} - {0} | {1}))
    schedule = reference.make_schedule(level_map, factors, n)
    for backend in (reference, training):
        pyramid = backend.build_pyramid(k, v, layout, factors, key_variance=key_variance, value_tilt=value_tilt)
        yield backend.attend(q, k, v, pyramid, schedule, layout, scale=D**-0.5)
    yield level_map


@pytest.mark.parametrize(("key_variance", "value_tilt"), TERMS)
@pytest.mark.parametrize(("L", "m", "n", "factors"), CASES)
def test_it_is_the_same_attention(L, m, n, factors, key_variance, value_tilt, rng):
    q, k, v = (torch.randn(2, 2, L, 16, generator=rng, dtype=torch.float64) for _ in range(3))
    looped, masked, _ = both(q, k, v, factors, m, n, rng, key_variance, value_tilt)
    # a few hundred roundings of float64
    torch.testing.assert_close(masked, looped, rtol=0, atol=1e-13 * float(looped.abs().max() + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stays_within_the_rounding_of_its_precision(dtype, rng):
    q, k, v = (torch.randn(1, 2, 130, 32, generator=rng).to(dtype) for _ in range(3))
    _, masked, level_map = both(q, k, v, (0, 1, 4, 32), 64, 32, rng, True, True)
    case = {"level_map": level_map, "block_m": 64, "block_n": 32, "key_variance": True, "value_tilt": True}
    assert_within_rounding(masked, oracle.oracle_attention(q, k, v, **case), q, k, v, **case)


@pytest.mark.parametrize("value_tilt", [False, True], ids=["plain", "value-tilt"])
def test_its_gradients_are_the_same(value_tilt, rng):
    q, k, v, g = (torch.randn(1, 2, 97, 16, generator=rng, dtype=torch.float64) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    looped, masked, _ = both(*inputs, (0, 1, 4, 32), 32, 32, rng, False, value_tilt)
    expected, got = (torch.autograd.grad(out, inputs, g) for out in (looped, masked))
    for name, a, b in zip("qkv", got, expected, strict=True):
        # sums of about a thousand products
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max() + 1), msg=name)


def test_both_pyramids_are_the_same(rng):
    k, v = (torch.randn(2, 2, 97, 16, generator=rng, dtype=torch.float64) for _ in range(2))
    layout = flat_layout(97, 32, 64, k.device)
    pyramids = [
        backend.build_pyramid(k, v, layout, (1, 2, 64), key_variance=True, value_tilt=True)
        for backend in (reference, training)
    ]
    real = torch.isfinite(pyramids[0].log_counts)
    for name in ("keys", "values", "variance", "covariance", "log_counts", "finite"):
        expected, got = (getattr(pyramid, name) for pyramid in pyramids)
        if name in ("keys", "values", "variance"):
            expected, got = (x[:, :, real] for x in (expected, got))  # undefined in an empty cell
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13, msg=name)
    assert pyramids[0].bases == pyramids[1].bases
