"""How far a result may be from the oracle: derived from the precision of its dtype, never tuned."""

import oracle
import torch


def max_error(actual, truth):
    return float((actual.double() - truth.double()).abs().max())


def assert_within_budget(actual, truth, rounded):
    """Twice the error of other arithmetic in the same dtype (`rounded`), and one rounding of the largest value.

    All errors are against the float64 oracle; the factor two leaves room for another order of the same operations.
    """
    budget = 2 * (max_error(rounded, truth) + torch.finfo(actual.dtype).eps * float(truth.abs().max()))
    assert actual.dtype == rounded.dtype
    assert torch.isfinite(actual).all()
    assert max_error(actual, truth) <= budget, f"error {max_error(actual, truth):.2e}, budget {budget:.2e}"


def assert_within_rounding(actual, truth, q, k, v, **case):
    """Within the budget that the oracle's own arithmetic, done in the dtype of the result, sets."""
    assert_within_budget(actual, truth, oracle.oracle_attention(q, k, v, dtype=q.dtype, **case))
