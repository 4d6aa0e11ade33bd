"""Stage 5: at which factor each block of queries reads each block of keys."""

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.types import LevelRule, Thresholds


def assign_block_levels(
    importance: Tensor, layout: Layout, rule: LevelRule, *, cap: Tensor | None = None, finite: Tensor | None = None
) -> Tensor:
    """Rank the video blocks of every row, and read all that touches text at factor 1.

    Args:
        importance: ``[B, H, M, N]``, larger is more important.
        layout: Where video and text blocks stand.
        rule: How importance becomes factors.
        cap: ``[B, H, N]`` largest factor that each key block bears, from `key_cosine_cap`.
        finite: ``[B, H]`` bool; a head that is not finite reads everything at factor 1, so that NaN and inf come out
            where dense attention has them.

    Returns:
        Level map ``[B, H, M, N]`` int16: the factor, or 0 = skip.
    """
    video_q, video_k = layout.video_query_blocks, layout.video_key_blocks
    level_map = torch.ones(importance.shape, dtype=torch.int16, device=importance.device)
    ranked = assign_ranked_levels(importance[:, :, :video_q, :video_k], rule)
    if cap is not None:
        ranked = torch.minimum(ranked, cap[:, :, None, :video_k].to(ranked.dtype))
    if finite is not None:
        ranked = torch.where(finite[:, :, None, None], ranked, 1)
    level_map[:, :, :video_q, :video_k] = ranked
    return level_map


def assign_ranked_levels(importance: Tensor, rule: LevelRule) -> Tensor:
    """Levels of one ranking per row: ``[..., N]`` importance to ``[..., N]`` int16 factors.

    A row with an importance that is not finite reads everything at factor 1. Ties break by index. Shares are summed in
    float32 or wider, and in a range that holds the sum, whatever the importance comes in.

    Source: arXiv:2512.04025, Alg. 2 and the quantile variant. Differs: the block that crosses a bound belongs to the
        finer side; shares are rounded, not aligned to a kernel tile; at least one block of a row is at factor 1.
    """
    num_blocks = importance.shape[-1]
    factors = torch.tensor([factor for factor, _ in rule.levels], dtype=torch.int16, device=importance.device)
    broken = ~torch.isfinite(importance).all(-1, keepdim=True)
    importance = torch.where(broken, 0, importance)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(num_blocks, device=importance.device)
    if rule.mode == "topk":
        bounds = [round(bound * num_blocks) for _, bound in rule.levels[:-1]]
        level = sum(((place >= bound).long() for bound in bounds), torch.zeros_like(place))
        level = level.expand(importance.shape)
        full = 1
    else:
        share = _in_range(importance.gather(-1, order))
        before = (share.cumsum(-1) - share) / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        level = sum(((before >= bound).long() for _, bound in rule.levels[:-1]), torch.zeros_like(order))
        full = max(1, -int(-rule.min_full_ratio * num_blocks // 1))
    ranked = torch.where(place < full, 1, factors[level])
    level_map = torch.empty_like(ranked).scatter_(-1, order, ranked)
    return torch.where(broken, 1, level_map).to(torch.int16)


def _in_range(share: Tensor) -> Tensor:
    """Shares in float32 or wider; a row whose sum is too large or too small for it is scaled by a power of two."""
    half = share.dtype in (torch.float16, torch.bfloat16)
    if half or not share.is_floating_point():
        share = share.to(torch.float32 if half else torch.float64)
    largest, finest = share.amax(-1, keepdim=True), torch.finfo(share.dtype)
    scale = torch.where(largest > finest.max * 2**-20, 2.0**-20, 1.0)  # rows are shorter than 2**20
    return share * torch.where(largest < finest.tiny * 2**30, 2.0**30, scale).to(share.dtype)


def key_cosine_cap(k: Tensor, layout: Layout, thresholds: Thresholds) -> Tensor:
    """The largest factor at which the keys of a block are still alike.

    A block bears factor h when the mean cosine of the first and the last key of its h-cells exceeds the threshold of
    h; cells that are not full do not count. The largest h that passes wins, and factor 1 if none does.

    Args:
        k: Keys ``[B, H, L, D]``; any strides.
        layout: Where tokens stand.
        thresholds: ``(factor, threshold)`` pairs, factors above 1.

    Returns:
        ``[B, H, N]`` int16.

    Source: arXiv:2512.04025, Alg. 3.
    """
    batch, heads = k.shape[:2]
    lanes = layout.key_rows.shape[0]
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    cap = torch.ones(batch, heads, layout.num_key_blocks, dtype=torch.int16, device=k.device)
    rows = layout.key_rows.clamp_min(0).long()
    for factor, threshold in sorted(thresholds):
        if factor > layout.block_n:
            continue
        full = (layout.cell_counts(factor) == factor).view(-1, layout.block_n // factor)
        ends = torch.arange(0, lanes, factor, device=k.device)
        first, last = (_scaled(k.index_select(2, rows[lane]).to(wide)) for lane in (ends, ends + factor - 1))
        cosine = torch.cosine_similarity(first, last, dim=-1).view(batch, heads, *full.shape)
        mean = torch.where(full, cosine, 0).sum(-1) / full.sum(-1).clamp_min(1)
        cap = torch.where((mean > threshold) & full.any(-1), factor, cap)
    return cap.to(torch.int16)


def _scaled(x: Tensor) -> Tensor:
    """Vectors of which no channel exceeds 1: their squares stay in range, and a cosine is the same."""
    return x / x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
