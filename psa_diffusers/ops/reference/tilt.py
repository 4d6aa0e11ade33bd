"""The gain of the value tilt: how far the tilt's first order is from what softmax does, on a sample of each head.

Plain torch on any device; on a GPU all heads at a time.
"""

from dataclasses import replace

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.types import GAIN_BLOCK_STRIDE, GAIN_QUERY_STRIDE, Pyramid


def fit_tilt(pyramid: Pyramid, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Pyramid:
    """Scale the covariance of each head by the gain at which the value tilt fits best.

    The tilt is of first order: within a cell the value moves by s q·C. Where the keys of a cell differ much, softmax
    saturates and the true shift is smaller.

    Args:
        pyramid: Pyramid with a covariance.
        q: Queries ``[B, H, L, D]``.
        k: Keys ``[B, H, L, D]``.
        v: Values ``[B, H, L, D]``.
        layout: Where tokens stand.
        scale: Softmax scale.
    """
    covariance = pyramid.covariance
    if covariance is None:
        raise ValueError("this pyramid has no covariance to scale: make it with value_tilt=True")
    gain = tilt_gain(q, k, v, layout, scale).to(covariance.dtype)
    return replace(pyramid, covariance=covariance * gain[:, :, None, None, None])


@torch.no_grad()
def tilt_gain(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Regress how far values shift under softmax on how far the tilt says they shift, one number a head.

    The sample: every 512th query of the video, every sixteenth of its key blocks. The true shift of a pair is the mean
    value of the block under the softmax of its scores, less its plain mean; the tilt says s q·C, with the within-block
    covariance C of the sampled blocks.

    Args:
        q: Queries ``[B, H, L, D]``.
        k: Keys ``[B, H, L, D]``.
        v: Values ``[B, H, L, D]``.
        layout: Where tokens stand.
        scale: Softmax scale.

    Returns:
        ``[B, H]`` in [0, 1], float32 (float64 for float64 inputs). Pairs that are not finite do not count.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    n = layout.block_n
    # a block begins at each of these lanes, so a token stands there
    queries = layout.query_rows[: layout.video_query_blocks * layout.block_m : GAIN_QUERY_STRIDE]
    lanes = layout.key_rows[: layout.video_key_blocks * n].view(-1, n)[::GAIN_BLOCK_STRIDE]
    real = lanes >= 0
    count = real.sum(1).to(wide)
    keys, values = (_take(x, lanes.flatten()).to(wide).unflatten(2, lanes.shape) for x in (k, v))
    keys, values = (_centred(x, real, count) for x in (keys, values))
    covariance = keys.flatten(2, 3).mT @ values.flatten(2, 3) / count.sum()

    query = _take(q, queries).to(wide)
    expected = scale * query @ covariance
    scores = scale * query @ keys.flatten(2, 3).mT
    weights = scores.masked_fill(~real.flatten(), -torch.inf).unflatten(3, lanes.shape).softmax(-1)
    along = (expected @ values.flatten(2, 3).mT).unflatten(3, lanes.shape)
    agreement = (weights * along).sum(-1)
    size = expected.square().sum(-1, keepdim=True).expand_as(agreement)
    finite = torch.isfinite(agreement) & torch.isfinite(size)
    agreement, size = (torch.where(finite, x, 0).sum((2, 3)) for x in (agreement, size))
    return (agreement / size.clamp_min(torch.finfo(wide).tiny)).clamp(0, 1)


def _centred(x: Tensor, real: Tensor, count: Tensor) -> Tensor:
    """Tokens less the mean of their block, 0 where there is no token: ``[B, H, blocks, n, D]``."""
    x = torch.where(real[..., None], x, 0)
    return torch.where(real[..., None], x - x.sum(3, keepdim=True) / count[:, None, None], 0)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(-2, rows.clamp_min(0).long())
