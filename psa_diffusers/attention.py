"""Pyramid sparse attention from start to end: the flow through the stages, and its public functions."""

import logging
import math
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_diffusers.ops import reference
from psa_diffusers.ops.layout import Layout, flat_layout, make_layout
from psa_diffusers.ops.reference.levels import assign_ranked_levels
from psa_diffusers.ops.reference.pyramid import Pyramid
from psa_diffusers.ops.reference.schedule import Schedule, make_schedule
from psa_diffusers.ops.types import KEY_VARIANCE_CAP
from psa_diffusers.presets import PSAPreset, load_preset, parse_mask_ratios, preset_of_key

logger = logging.getLogger("psa_diffusers")

BACKENDS = ("auto", "torch", "triton")


def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    preset: str | PSAPreset = "psa_balanced",
    *,
    grid: tuple[int, int, int] | None = None,
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
            nothing and only pools and attends. NaN and inf come out where the schedule reads them. None decides anew.
        return_schedule: Whether to return what was read as well.

    Returns:
        ``[B, H, L, D]`` in the dtype and order of q; with ``return_schedule`` also the `Schedule`, whose ``density()``
        and ``to_level_map()`` tell what was read.

    Raises:
        TypeError: For a dtype or device that does not fit, or a preset of another kind.
        ValueError: For shapes that do not fit each other or the grid, a schedule of another call, an unknown preset or
            backend.
        RuntimeError: If ``backend="triton"`` cannot run here.

    Source: arXiv:2512.04025. What differs from the paper and the official code stands in docs/developer/fidelity.md.
    """
    if not isinstance(preset, (str, PSAPreset)):
        raise TypeError(f"preset must be a name or a PSAPreset, got a {type(preset).__name__}")
    key = _key_of_name(preset) if isinstance(preset, str) else preset.key
    _check_qkv(q, k, v)
    grid = (1, 1, q.shape[2] - text_tokens) if grid is None else tuple(int(size) for size in grid)
    _check_grid(q, grid, text_tokens)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if return_schedule or schedule is not None or needs_grad(q, k, v):
        out, schedule = _run(q, k, v, preset_of_key(key), grid, text_tokens, text_first, scale, backend, schedule)
        return (out, schedule) if return_schedule else out
    return _psa_op(q, k, v, key, list(grid), text_tokens, text_first, scale, backend)


def _run(
    q, k, v, preset: PSAPreset, grid, text_tokens, text_first, scale, backend, schedule: Schedule | None = None
) -> tuple[Tensor, Schedule]:
    """The stages in order, those that decide what is read only without a schedule."""
    column = _column(resolve_backend(backend, q, k, v))
    preset = preset.for_video(math.prod(grid))
    layout = make_layout(
        grid, text_tokens, text_first, preset.block_m, preset.block_n, preset.order, preset.tile_size, q.device
    )
    if schedule is not None:
        _check_schedule(schedule, q, layout, (1,) if preset.type == "dense" else preset.factors)
    if preset.type == "dense":
        return F.scaled_dot_product_attention(q, k, v, scale=scale), _full_schedule(q, layout)
    pyramid = column.build_pyramid(
        k, v, layout, preset.factors, key_variance=preset.key_variance, value_tilt=preset.value_tilt
    )
    if preset.value_tilt and preset.tilt_gain == "sampled":
        pyramid = column.fit_tilt(pyramid, q, k, v, layout, scale)
    schedule = schedule or _decide(backend, q, k, pyramid, layout, preset, scale)
    out = column.attend(q, k, v, pyramid, schedule, layout, scale=scale, variance_cap=KEY_VARIANCE_CAP)
    return out, schedule


@torch.no_grad()
def _decide(
    backend: str, q: Tensor, k: Tensor, pyramid: Pyramid, layout: Layout, preset: PSAPreset, scale: float
) -> Schedule:
    """What is read at which factor. No gradient goes through it, so the kernels decide in training too."""
    column = _column(resolve_backend(backend, q))
    importance = column.block_importance(q, k, layout, preset.importance, scale, pyramid)
    cap = column.key_cosine_cap(k, layout, _cosine_thresholds(preset)) if preset.use_sim_mask else None
    return column.plan_blocks(
        importance,
        layout,
        preset.levels,
        preset.mask_mode,
        preset.factors,
        min_full_ratio=preset.min_full_ratio,
        cap=cap,
        finite=pyramid.finite,
    )


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
        TypeError: For a dtype or device that does not fit.
        ValueError: For shapes, blocks or factors that do not fit.
    """
    _check_qkv(q, k, v)
    batch, heads, tokens, dim = q.shape
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        if block < 1 or block & (block - 1):
            raise ValueError(f"{name} must be a power of two, got {block}")
    expected = (batch, heads, -(-tokens // block_m), -(-tokens // block_n))
    if tuple(level_map.shape) != expected:
        raise ValueError(
            f"level_map must be [B, H, M, N] = {list(expected)} for {tokens} tokens in blocks of {block_m} queries and "
            f"{block_n} keys, got {list(level_map.shape)}"
        )
    used = set(level_map.unique().tolist()) if level_map.numel() else set()
    allowed = {0, *(1 << bit for bit in range(block_n.bit_length()))}
    if not used <= allowed:
        raise ValueError(
            f"level_map holds factors {sorted(used - allowed)}; "
            f"with block_n={block_n} a factor is one of {sorted(allowed)}"
        )
    scale = 1 / math.sqrt(dim) if scale is None else float(scale)
    column = _column(resolve_backend(backend, q, k, v))
    layout = flat_layout(tokens, block_m, block_n, q.device)
    factors = tuple(sorted(used - {0} | {1}))
    pyramid = column.build_pyramid(k, v, layout, factors, key_variance=key_variance, value_tilt=value_tilt)
    schedule = column.make_schedule(level_map.to(device=q.device, dtype=torch.int16), factors, block_n)
    return column.attend(q, k, v, pyramid, schedule, layout, scale=scale, variance_cap=KEY_VARIANCE_CAP)


def assign_levels(importance: Tensor, mask_ratios, mask_mode: str = "topk", *, min_full_ratio: float = 0.06) -> Tensor:
    """Give every pair of blocks a factor, by rank or by cumulative mass along each row.

    Args:
        importance: ``[B, H, M, N]``, larger is more important.
        mask_ratios: ``{factor: [low, high]}``, intervals of the unit line that touch; factor 0 skips.
        mask_mode: ``topk``: the intervals are shares of the N blocks. ``thresholdbound``: shares of the row's
            importance; the block at which a bound is crossed belongs to the finer side.
        min_full_ratio: For ``thresholdbound``, the least share of blocks at factor 1.

    Returns:
        ``[B, H, M, N]`` int16: the factor, or 0 = skip. At least one block of every row is at factor 1.

    Raises:
        ValueError: For intervals that overlap or leave gaps, unknown factors or an unknown mode.
    """
    if mask_mode not in ("topk", "thresholdbound"):
        raise ValueError(f"mask_mode must be 'topk' or 'thresholdbound', got {mask_mode!r}")
    return assign_ranked_levels(importance, parse_mask_ratios(mask_ratios), mask_mode, min_full_ratio)


def resolve_backend(backend: str, *tensors: Tensor) -> str:
    """``torch`` or ``triton``: what ``backend`` means for tensors alike, or an error that says why it cannot be."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
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
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _interpreting() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def say_once(message: str) -> None:
    """Log a warning, once a process."""
    logger.warning(message)


# files are read while torch compiles, not by compiled code
@torch.compiler.assume_constant_result
def _key_of_name(name: str) -> str:
    return load_preset("default", name).key


def _column(backend: str) -> ModuleType:
    """The stages in plain torch, or the same stages as Triton kernels."""
    if backend == "torch":
        return reference
    from psa_diffusers.ops import triton as triton_backend

    return triton_backend


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record what is done with any of the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _cosine_thresholds(preset: PSAPreset) -> tuple[tuple[int, float], ...]:
    thresholds = preset.sim_thresholds
    return (2, thresholds.x2), (4, thresholds.x4), (8, thresholds.x8)


def _full_schedule(q: Tensor, layout: Layout) -> Schedule:
    shape = (q.shape[0], q.shape[1], layout.num_query_blocks, layout.num_key_blocks)
    return make_schedule(torch.ones(shape, dtype=torch.int16, device=q.device), (1,), layout.block_n)


@torch.library.custom_op("psa_diffusers::psa_attention", mutates_args=())
def _psa_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    preset_key: str,
    grid: list[int],
    text_tokens: int,
    text_first: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return _run(q, k, v, preset_of_key(preset_key), tuple(grid), text_tokens, text_first, scale, backend)[0]


@_psa_op.register_fake
def _(q, k, v, preset_key, grid, text_tokens, text_first, scale, backend):
    return torch.empty_like(q)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "self-attention needs q, k and v of one shape [B, H, L, D], got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise TypeError(
            "q, k and v must have one dtype and one device, got "
            + ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in zip("qkv", (q, k, v), strict=True))
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"q, k and v must be float32, float16, bfloat16 or float64, got {q.dtype}: cast them first")
    if unsupported := unsupported_head_dim(q.shape[-1]):
        raise ValueError(unsupported)
    if 0 in q.shape:
        raise ValueError(f"q, k and v must not be empty, got shape {tuple(q.shape)}")


def unsupported_head_dim(dim: int) -> str | None:
    """Why a head dimension cannot run, or None if it can."""
    if dim % 8 or not 16 <= dim <= 256:
        return f"the head dimension must be a multiple of 8 from 16 to 256, got {dim}: pad q, k and v with zeros"
    return None


def _check_grid(q: Tensor, grid: tuple[int, ...], text_tokens: int) -> None:
    if len(grid) != 3 or min(grid) < 1 or text_tokens < 0:
        raise ValueError(
            "grid must be (frames, height, width) in tokens, each at least 1, and text_tokens at least 0, "
            f"got {grid} and {text_tokens}"
        )
    frames, height, width = grid
    if frames * height * width + text_tokens != q.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} tokens, but the grid {frames} x {height} x {width} and {text_tokens} text tokens make "
            f"{frames * height * width + text_tokens}: pass the grid in tokens (after patching), and text_tokens"
        )


def _check_schedule(schedule: Schedule, q: Tensor, layout: Layout, factors: tuple[int, ...]) -> None:
    """Refuse what would read out of range. The numbers in it are not read: that would wait for the GPU."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule that psa_attention returned, got a {type(schedule).__name__}")
    shape = (q.shape[0], q.shape[1], layout.num_query_blocks, layout.num_key_blocks)
    expected = {
        "[B, H, M, N]": shape,
        "[B, H, M, F + 1]": (*shape[:3], len(factors) + 1),
        "block_n": layout.block_n,
        "factors": factors,
        "device": q.device,
    }
    ids, offsets = schedule.block_ids, schedule.offsets
    has = (tuple(ids.shape), tuple(offsets.shape), schedule.block_n, schedule.factors, ids.device)
    found = dict(zip(expected, has, strict=True))
    if found != expected:
        told = [", ".join(f"{name} = {value}" for name, value in each.items()) for each in (expected, found)]
        raise ValueError(f"schedule is of another call: expected {told[0]}; got {told[1]}. Leave it out to decide anew")
