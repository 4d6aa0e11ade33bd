"""What every launcher needs: the right device, memory of what a layout implies, and how factors travel to a kernel."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.ops.layout import Layout

_KNOWN: WeakKeyDictionary[Layout, dict[Any, Any]] = WeakKeyDictionary()


def on_device(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` current: a kernel starts on the current device, wherever its tensors are."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@contextmanager
def aside(x: Tensor) -> Iterator[list[torch.cuda.Event]]:
    """Let what is launched run beside what comes next. Yields a list that will hold the event to wait for.

    Who uses a result on another stream waits for the event and calls `record_stream`. On a CPU nothing is different.
    """
    done: list[torch.cuda.Event] = []
    if not x.is_cuda:
        yield done
        return
    stream = _side_stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        yield done
    done.append(stream.record_event())


def wait_for(ready: torch.cuda.Event | None, x: Tensor | None) -> None:
    """Let the current stream wait for what `aside` made, and keep its memory until the stream is past its use."""
    if ready is not None:
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(ready)
        x.record_stream(stream)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def remember(layout: Layout, key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, once for each layout and key. For what depends on the layout alone."""
    known = _KNOWN.setdefault(layout, {})
    if key not in known:
        known[key] = make()
    return known[key]


def head_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of ``[B, H, L, D]``; the kernels step through D one by one."""
    if x.stride(3) != 1:
        raise ValueError(
            f"the last axis of q, k and v must be contiguous, got strides {tuple(x.stride())}: call .contiguous() first"
        )
    return x.stride()[:3]


def padded(size: int) -> int:
    """The power of two, 16 or more, that holds ``size`` channels: matrix units take nothing smaller."""
    return max(16, next_power_of_2(size))


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below ``size``. Triton's own takes 4 microseconds on the host, this none."""
    return 1 << (size - 1).bit_length()


def cdiv(size: int, part: int) -> int:
    """How many parts cover ``size``; as `next_power_of_2`, for the host's sake."""
    return -(-size // part)


def pack_factors(factors: tuple[int, ...]) -> int:
    """log2 of every factor in four bits each, the first lowest: one integer that a kernel's loop can index."""
    return sum((factor.bit_length() - 1) << (4 * f) for f, factor in enumerate(factors))


@triton.jit
def load_rows(base_ptr, rows, mask, stride, channels, D: tl.constexpr, C: tl.constexpr):
    """Rows ``[R, C]`` of a matrix with D columns; what is masked, and channels past D, are 0 and not read."""
    mask = mask[:, None]
    # `channels` are C of them from a multiple of C below D: where D is a multiple too, none is past D
    if D % C != 0:
        mask = mask & (channels < D)[None, :]
    # int64 before it meets a stride: tokens x heads x channels passes 2**31
    return tl.load(base_ptr + rows.to(tl.int64)[:, None] * stride + channels[None, :], mask=mask, other=0.0)
