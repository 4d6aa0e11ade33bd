"""Dense attention by the fastest kernel of the machine, for the calls that PSA leaves dense."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FASTEST_ON_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class _Order(AbstractContextManager):
    """The order above, set by the first thread that comes and put back by the last that goes: torch has one for all."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._set = sdpa_kernel(FASTEST_ON_HOPPER, set_priority=True)
                self._set.__enter__()
            self._inside += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set.__exit__(None, None, None)


_ORDER = _Order()


def fastest_dense(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which `scaled_dot_product_attention` tries the kernels from the fastest to the slowest.

    On Hopper cuDNN's comes first; a call that it cannot take goes to the next one. On other machines, and where some
    kernels are switched off, torch's own order stands. A kernel that is chosen further inside, as an attention backend
    of diffusers is, wins. The order is torch's, one for all threads, and is put back at the end.

    Args:
        x: A tensor on the device that attends.
    """
    if not _is_open_hopper(x.device.type, x.device.index):
        return nullcontext()
    if torch.compiler.is_compiling():
        return sdpa_kernel(FASTEST_ON_HOPPER, set_priority=True)  # which torch knows how to compile
    return _ORDER


@torch.compiler.assume_constant_result  # the kernel of compiled code is chosen while torch compiles
def _is_open_hopper(kind: str, index: int | None) -> bool:
    """Whether the device is a Hopper GPU, and nobody has switched a kernel off."""
    if kind != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(index)[0] != 9:
        return False
    cuda = torch.backends.cuda
    flags = (cuda.cudnn_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    return all(is_enabled() for is_enabled in flags)
