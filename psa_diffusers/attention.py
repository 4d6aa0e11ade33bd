"""Pyramid sparse attention from start to end: public functions, the flow, and the one place that picks a backend."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_diffusers.ops import reference, training
from psa_diffusers.ops.checks import (
    check_importance,
    check_qkv,
    checked_grid,
    checked_ratio,
    checked_scale,
    factors_of_map,
)
from psa_diffusers.ops.given import check_numbers, checked_schedule, know_right
from psa_diffusers.ops.layout import Layout, flat_layout, make_layout
from psa_diffusers.ops.reference.levels import assign_ranked_levels
from psa_diffusers.ops.types import Backend, Factors, LevelRule, Pyramid, Schedule, Thresholds, level_dtype
from psa_diffusers.presets import PSAPreset, load_preset, parse_mask_ratios, preset_of_key

logger = logging.getLogger("psa_diffusers")

BACKENDS = ("auto", "torch", "triton")

Grid: TypeAlias = tuple[int, int, int]
MaskRatios: TypeAlias = Mapping[int | str, Sequence[float]] | Sequence[Sequence[float]]


def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    preset: str | PSAPreset = "psa_balanced",
    *,
    grid: Grid | None = None,
    text_tokens: int = 0,
    text_first: bool = True,
    scale: float | None = None,
    backend: str = "auto",
    schedule: Schedule | None = None,
    return_schedule: bool = False,
) -> Tensor | tuple[Tensor, Schedule]:
    """Self-attention over the tokens of a video, important blocks at full resolution and the others pooled.

    Args:
        q: Queries ``[B, H, L, D]``, tokens in the order of the model. Views are read in place; only the last axis has
            to be contiguous. float32, float16, bfloat16, and float64 with the torch backend.
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        preset: A `PSAPreset`, or the name of a preset of the section ``default`` of the preset file.
        grid: ``(frames, height, width)`` of the video in tokens, frames slowest. Without it the tokens are taken as
            one line and not reordered.
        text_tokens: Number of text tokens in the sequence. Text is read, and reads, at full resolution.
        text_first: Whether the text tokens come before the video tokens (True) or after them.
        scale: Softmax scale; ``1 / sqrt(D)`` by default.
        backend: ``auto`` (Triton on CUDA and ROCm, torch elsewhere), ``torch`` or ``triton``. An explicit ``triton``
            raises where it cannot run.
        schedule: What to read, as an earlier call with the same preset, shapes and grid returned it: this call decides
            nothing and only pools and attends. ``schedule[heads]`` is the one of some heads. NaN and inf come out where
            the schedule reads them. Numbers that another hand has made are checked, which waits for the GPU. None
            decides anew.
        return_schedule: Whether to return what was read as well.

    Returns:
        ``[B, H, L, D]`` in the dtype and order of q; with ``return_schedule`` also the `Schedule`, whose ``density()``
        and ``to_level_map()`` tell what was read.

    Raises:
        TypeError: For a dtype or device that does not fit, or an argument of another kind.
        ValueError: For shapes that do not fit each other or the grid, a schedule of another call, an unknown preset or
            backend.
        RuntimeError: If ``backend="triton"`` cannot run here.

    Source: arXiv:2512.04025. What differs from the paper and the official code stands in docs/developer/fidelity.md.
    """
    if not isinstance(preset, (str, PSAPreset)):
        raise TypeError(f"preset must be a name or a PSAPreset, got a {type(preset).__name__}")
    key = _key_of_name(preset) if isinstance(preset, str) else preset.key
    check_backend(backend)
    check_qkv(q, k, v)
    grid = checked_grid(q, grid, text_tokens)
    if not isinstance(text_first, bool):
        raise TypeError(f"text_first must be True or False, got {text_first!r}")
    scale = checked_scale(scale, q.shape[-1])
    if return_schedule or schedule is not None or needs_grad(q, k, v):
        out, schedule = _flow(q, k, v, preset_of_key(key), grid, text_tokens, text_first, scale, backend, schedule)
        if not return_schedule:
            return out
        know_right(schedule)
        return out, schedule
    attended: Tensor = _psa_op(q, k, v, key, list(grid), text_tokens, text_first, scale, backend)
    return attended


def _flow(
    q: Tensor, k: Tensor, v: Tensor, preset: PSAPreset, grid: Grid, text_tokens: int, text_first: bool,
    scale: float, backend: str, schedule: Schedule | None = None,
) -> tuple[Tensor, Schedule]:  # fmt: skip
    """The flow: lay out, pool, decide what is read unless a schedule says so, attend."""
    preset = preset.for_video(math.prod(grid))
    blocks = (preset.block_m, preset.block_n, preset.order, preset.tile_size)
    layout = make_layout(grid, text_tokens, text_first, *blocks, q.device)
    chosen = choose_backends(backend, q, k, v, layout, preset.factors)
    if schedule is not None:
        schedule = checked_schedule(schedule, q, layout, (1,) if preset.type == "dense" else preset.factors)
    if preset.type == "dense":
        return F.scaled_dot_product_attention(q, k, v, scale=scale), _full_schedule(q, layout)
    if schedule is not None:
        check_numbers(schedule)
    terms = {"key_variance": preset.key_variance, "value_tilt": preset.value_tilt}
    pyramid = chosen.pooling.build_pyramid(k, v, layout, preset.factors, **terms)
    if preset.value_tilt and preset.tilt_gain == "sampled":
        pyramid = chosen.pooling.fit_tilt(pyramid, q, k, v, layout, scale)
    if schedule is None:
        schedule = _decide(chosen.planning, q, k, pyramid, layout, preset, scale)
    return chosen.attention.attend(q, k, v, pyramid, schedule, layout, scale), schedule


@torch.no_grad()
def _decide(
    backend: Backend, q: Tensor, k: Tensor, pyramid: Pyramid, layout: Layout, preset: PSAPreset, scale: float
) -> Schedule:
    """What is read at which factor. No gradient goes through it."""
    importance = backend.block_importance(q, k, layout, preset.importance, scale, pyramid)
    cap = backend.key_cosine_cap(k, layout, _cosine_thresholds(preset)) if preset.use_sim_mask else None
    rule = LevelRule(preset.levels, preset.mask_mode, preset.min_full_ratio)
    return backend.plan_blocks(importance, layout, rule, preset.factors, cap=cap, finite=pyramid.finite)


def pyramid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_map: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float | None = None,
    key_variance: bool = False,
    value_tilt: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention at given factors: the definition of docs/developer/concept.md, tokens as they stand.

    Args:
        q: Queries ``[B, H, L, D]``.
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        level_map: ``[B, H, M, N]`` integers, M = ceil(L / block_m), N = ceil(L / block_n): the factor (a power of two
            up to block_n) at which a block of queries reads a block of keys, or 0 = skip.
        block_m: Tokens of a query block.
        block_n: Tokens of a key block, a power of two.
        scale: Softmax scale; ``1 / sqrt(D)`` by default.
        key_variance: Whether to correct the weight of a cell for the variance of its keys.
        value_tilt: Whether to correct the value of a cell for its covariance with the keys, to first order.
        backend: As in `psa_attention`.

    Returns:
        ``[B, H, L, D]``. A row that keeps nothing is 0.

    Raises:
        TypeError: For a dtype or device that does not fit, or an argument of another kind.
        ValueError: For shapes, blocks or factors that do not fit.
    """
    check_qkv(q, k, v)
    factors = factors_of_map(level_map, q, block_m, block_n)
    scale = checked_scale(scale, q.shape[-1])
    layout = flat_layout(q.shape[2], block_m, block_n, q.device)
    chosen = choose_backends(backend, q, k, v, layout, factors)
    pyramid = chosen.pooling.build_pyramid(k, v, layout, factors, key_variance=key_variance, value_tilt=value_tilt)
    schedule = chosen.pooling.make_schedule(level_map.to(device=q.device, dtype=level_dtype(factors)), factors, block_n)
    return chosen.attention.attend(q, k, v, pyramid, schedule, layout, scale)


def assign_levels(
    importance: Tensor, mask_ratios: MaskRatios, mask_mode: str = "topk", *, min_full_ratio: float = 0.06
) -> Tensor:
    """Give every pair of blocks a factor, by rank or by cumulative mass along each row.

    Args:
        importance: ``[B, H, M, N]`` of any dtype, larger is more important. Sums are taken in float32 or wider.
        mask_ratios: ``{factor: [low, high]}``, intervals of the unit line that touch; factor 0 skips.
        mask_mode: ``topk``: the intervals are shares of the N blocks. ``thresholdbound``: shares of the row's
            importance; the block at which a bound is crossed belongs to the finer side.
        min_full_ratio: For ``thresholdbound``, the least share of blocks at factor 1, from 0 to 1.

    Returns:
        ``[B, H, M, N]`` int16: the factor, or 0 = skip. At least one block of every row is at factor 1.

    Raises:
        TypeError: For an importance that is no tensor of real numbers, or a ratio that is no number.
        ValueError: For intervals that overlap or leave gaps, unknown factors, an unknown mode, or numbers out of range.
    """
    if mask_mode not in ("topk", "thresholdbound"):
        raise ValueError(f"mask_mode must be 'topk' or 'thresholdbound', got {mask_mode!r}")
    check_importance(importance, mask_mode)
    rule = LevelRule(parse_mask_ratios(mask_ratios), mask_mode, checked_ratio(min_full_ratio, "min_full_ratio"))
    return assign_ranked_levels(importance, rule)


class Backends(NamedTuple):
    """Which backend does what in one call.

    Attributes:
        pooling: Makes the pyramid.
        planning: Decides what is read.
        attention: Reads it.
    """

    pooling: Backend
    planning: Backend
    attention: Backend


def choose_backends(backend: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, factors: Factors) -> Backends:
    """The one place that picks, from what the user asked for and what the tensors are.

    The kernels have no backward pass, so where a gradient is due plain torch pools and attends, on a GPU as
    `ops.training` does as long as its mask fits. The kernels still decide: no gradient goes through that.
    """
    compute = _load_backend(resolve_backend(backend, q, k, v))
    if not needs_grad(q, k, v):
        return Backends(compute, compute, compute)
    with torch.no_grad():
        decide = _load_backend(resolve_backend(backend, q))
    fits = training.mask_bytes(q, layout, factors) <= training.MASK_BYTES
    return Backends(
        pooling=training if q.is_cuda and needs_grad(k, v) else compute,
        planning=decide,
        attention=training if q.is_cuda and fits else compute,
    )


def check_backend(backend: str) -> None:
    """Refuse what names no backend."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def resolve_backend(backend: str, *tensors: Tensor) -> str:
    """``torch`` or ``triton``: what ``backend`` means for tensors alike, or an error that says why it cannot be."""
    check_backend(backend)
    if backend == "torch":
        return "torch"
    reason = _why_no_triton(*tensors)
    if backend == "triton" and reason:
        raise RuntimeError(
            f"backend='triton' cannot run here: {reason}. Use backend='torch', or 'auto' to let us choose."
        )
    if reason is None:
        return "triton"
    if tensors[0].device.type == "cuda":
        say_once(f"psa_attention attends with the plain torch stages, which are slow on a GPU: {reason}")
    return "torch"


def _why_no_triton(q: Tensor, *others: Tensor) -> str | None:
    if needs_grad(q, *others):
        return "the Triton kernels have no backward pass and an input requires a gradient"
    if q.dtype == torch.float64:
        return "the Triton kernels take float32, float16 and bfloat16, not float64"
    if not _triton_found():
        return "triton is not installed"
    if q.device.type != "cuda" and not _interpreting():
        return f"the tensors are on {q.device.type!r}, and Triton needs a CUDA or ROCm device"
    if q.device.type != "cuda" and q.dtype == torch.bfloat16:
        return "the Triton interpreter computes noise in bfloat16"
    return None


@cache
def _triton_found() -> bool:
    return find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _load_backend(name: str) -> Backend:
    if name == "torch":
        return reference
    from psa_diffusers.ops import triton

    kernels: Backend = triton
    return kernels


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record what is done with any of the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@cache
def say_once(message: str) -> None:
    """Log a warning, once a process."""
    logger.warning(message)


def _load_key(name: str) -> str:
    return load_preset("default", name).key


# files are read while torch compiles, not by compiled code
_key_of_name: Callable[[str], str] = torch.compiler.assume_constant_result(_load_key)


def _cosine_thresholds(preset: PSAPreset) -> Thresholds:
    thresholds = preset.sim_thresholds
    return (2, thresholds.x2), (4, thresholds.x4), (8, thresholds.x8)


def _full_schedule(q: Tensor, layout: Layout) -> Schedule:
    shape = (q.shape[0], q.shape[1], layout.num_query_blocks, layout.num_key_blocks)
    return reference.make_schedule(torch.ones(shape, dtype=torch.int16, device=q.device), (1,), layout.block_n)


@torch.library.custom_op("psa_diffusers::psa_attention", mutates_args=())
def _psa_op(
    q: Tensor, k: Tensor, v: Tensor, preset_key: str, grid: list[int], text_tokens: int, text_first: bool,
    scale: float, backend: str,
) -> Tensor:  # fmt: skip
    frames, height, width = grid
    place = ((frames, height, width), text_tokens, text_first)
    return _flow(q, k, v, preset_of_key(preset_key), *place, scale, backend)[0]


@_psa_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, preset_key: str, grid: list[int], text_tokens: int, text_first: bool,
    scale: float, backend: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(q)
