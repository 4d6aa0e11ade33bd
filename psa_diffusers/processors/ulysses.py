"""One video over several GPUs: diffusers' context parallelism of the Ulysses kind, with PSA as its attention.

Each process has a part of the tokens. Before attention they are exchanged for all tokens of a part of the heads, which
is all that PSA needs: every head is planned and computed as in one process. Afterwards they are exchanged back.

Source: DeepSpeed-Ulysses, arXiv 2309.14509; the exchange itself is that of diffusers/models/attention_dispatch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.ops.types import Schedule
from psa_diffusers.presets import PSAPreset

RING = (
    "ring attention gives a layer a part of the keys at a time, but PSA needs all of them: use "
    "ContextParallelConfig(ulysses_degree=...), or call disable_psa(pipe)"
)


def context_parallel(processor: Any) -> Any:
    """Return the `ContextParallelConfig` that diffusers has given a processor, None without one."""
    return getattr(getattr(processor, "_parallel_config", None), "context_parallel_config", None)


def why_not(config: Any, has_plan: bool) -> str:
    """Say why PSA cannot run under this `ContextParallelConfig`; empty if it can.

    Args:
        config: The configuration.
        has_plan: Whether the split of the tokens is that of the denoiser's class, not one of the user's own.
    """
    if config.ring_degree > 1:
        return RING
    if not has_plan:
        return "the class of the denoiser has no plan of its own for context parallelism"
    return ""


def local_tokens(config: Any, tokens: int) -> int:
    """Return how many of the tokens are in this process."""
    degree, rank = config.ulysses_degree, config._ulysses_local_rank
    return tokens // degree + (rank < tokens % degree)


class HeadDealer:
    """Deals heads to the processes so that those that read much do not pile up in one.

    Under a preset by rank all heads cost the same, and stay as they are. Under one by accumulated importance, or with
    the cap by cosine, the costs of a call decide how the next call of the layer is dealt. Nothing waits for the GPU:
    the costs are gathered, sorted and used there. Every process computes the same order from the same numbers.
    """

    def __init__(self) -> None:
        self.order: Tensor | None = None

    @staticmethod
    def is_needed(preset: PSAPreset, heads: int, degree: int) -> bool:
        """Whether heads may differ, and can be dealt evenly."""
        return (preset.mask_mode != "topk" or preset.use_sim_mask) and heads % degree == 0 and heads > degree

    def learn(self, costs: Tensor, config: Any) -> None:
        """Deal anew.

        Args:
            costs: Of the heads of this process, ``[heads / degree]``, in the order that was dealt.
            config: The `ContextParallelConfig`.
        """
        degree, group = config.ulysses_degree, config._ulysses_mesh.get_group()
        gathered = torch.empty(degree * len(costs), dtype=costs.dtype, device=costs.device)
        torch.distributed.all_gather(list(gathered.chunk(degree)), costs.contiguous(), group=group)
        if self.order is not None:
            gathered = torch.empty_like(gathered).index_copy(0, self.order, gathered)
        self.order = deal(gathered, degree)


def deal(costs: Tensor, degree: int) -> Tensor:
    """Deal heads from the dearest to the cheapest, forth and back: to 0, 1, 2, 2, 1, 0, 0, …

    Args:
        costs: ``[heads]``.
        degree: Number of processes, a divisor of the number of heads.

    Returns:
        Heads ``[heads]``, those of the first process first.
    """
    places = torch.arange(len(costs), device=costs.device).view(-1, degree)
    places[1::2] = places[1::2].flip(1)
    return costs.argsort(descending=True, stable=True)[places.T.flatten()]


def cost_of_heads(schedule: Schedule) -> Tensor:
    """Share of the dense work by head ``[H]``, mean over the batch and the query blocks."""
    counts = schedule.offsets.diff(dim=-1).float()
    cost = torch.tensor([1 / factor for factor in schedule.factors], device=counts.device)
    return (counts * cost).sum(-1).mean((0, 2)) / schedule.block_ids.shape[-1]


def attend(
    q: Tensor, k: Tensor, v: Tensor, parallel_config: Any, attention: Callable[..., Tensor], order: Tensor | None
) -> Tensor:
    """Attend to all tokens with the heads of this process.

    Args:
        q: All heads of the tokens of this process, ``[B, H, L / degree, D]``.
        k: The same.
        v: The same.
        parallel_config: The `ParallelConfig` of the processor.
        attention: ``(q, k, v)`` of all tokens and some heads, ``[B, H / degree, L, D]``, to the output.
        order: As a `HeadDealer` has it.

    Returns:
        ``[B, H, L / degree, D]``.
    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    def forward_op(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    if order is not None:
        q, k, v = (x.index_select(1, order) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _templated_context_parallel_attention(
        q, k, v, forward_op=forward_op, backward_op=None, _parallel_config=parallel_config
    )
    out = out.transpose(1, 2)
    return out if order is None else torch.empty_like(out).index_copy(1, order, out)
