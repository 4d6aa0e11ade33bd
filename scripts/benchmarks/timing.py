"""Time, memory and error of a call, for the programs that measure speed."""

import ctypes
import statistics
import time
from pathlib import Path

import torch


def relative_error(out, truth):
    return float((out - truth).abs().float().sum() / truth.abs().float().sum())


def timed(call, device, milliseconds):
    """Median, and the fifth and four fifths of the way, in milliseconds."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return do_bench(call, warmup=milliseconds // 4, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    times.sort()
    return times[3], times[1], times[5]


def pair_medians(dense, sparse, device, milliseconds, dense_ms):
    """Times of both; on a CPU calls alternate, so that a machine that slows down slows both."""
    if device.startswith("cuda"):
        return dense_ms, timed(sparse, device, milliseconds)
    pairs = []
    for _ in range(9):
        pair = []
        for call in (dense, sparse):
            start = time.perf_counter()
            call()
            pair.append(1000 * (time.perf_counter() - start))
        pairs.append(pair)
    return tuple((statistics.median(x), sorted(x)[2], sorted(x)[6]) for x in zip(*pairs, strict=True))


def extra_memory(call, device):
    """Bytes that a call needs beyond what was held before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed but kept would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is held now
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def matrix_rate(device):
    """TFLOP/s of a large product in bfloat16: what the chip's matrix units do for torch."""
    if not device.startswith("cuda"):
        return None
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return round(2 * 8192**3 / timed(lambda: a @ b, device, 100)[0] / 1e9, 1)
