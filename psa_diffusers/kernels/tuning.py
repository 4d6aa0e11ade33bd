"""How to launch each kernel on which chip: a table, so that the first call costs nothing and every run does the same.

These are default rows: they compile, fit the shared memory of every chip of their class and spill no registers
(tests/kernels/test_kernels_compile.py). They are not measured; measured rows come with the work on a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from psa_diffusers.kernels.launch import padded


@dataclass(frozen=True)
class AttendLaunch:
    """Attributes:
    rows: Queries a program, at most a query block (16 at least: the matrix units' smallest tile).
    tile_n: Cells an iteration.
    num_warps: Warps a program.
    num_stages: Iterations in flight.
    """

    rows: int
    tile_n: int
    num_warps: int
    num_stages: int


# (class of chip, bytes a number, padded head dimension) -> the launch for the largest query block
_ATTEND = {
    # 99 KiB of shared memory a program: sm_86, sm_89, sm_120, and whatever we do not know
    ("small", 2, 16): AttendLaunch(128, 64, 8, 2),
    ("small", 2, 32): AttendLaunch(128, 64, 8, 2),
    ("small", 2, 64): AttendLaunch(128, 64, 8, 2),
    ("small", 2, 128): AttendLaunch(64, 64, 8, 2),
    ("small", 2, 256): AttendLaunch(64, 32, 8, 2),
    # 163 KiB and more: sm_80, sm_90, sm_100
    ("large", 2, 16): AttendLaunch(128, 64, 8, 2),
    ("large", 2, 32): AttendLaunch(128, 64, 8, 2),
    ("large", 2, 64): AttendLaunch(128, 64, 8, 2),
    ("large", 2, 128): AttendLaunch(128, 32, 8, 2),
    ("large", 2, 256): AttendLaunch(128, 32, 8, 2),
    # 64 KiB: gfx9
    ("hip", 2, 16): AttendLaunch(128, 64, 4, 2),
    ("hip", 2, 32): AttendLaunch(128, 64, 4, 2),
    ("hip", 2, 64): AttendLaunch(128, 64, 4, 2),
    ("hip", 2, 128): AttendLaunch(128, 64, 8, 1),
    ("hip", 2, 256): AttendLaunch(64, 32, 8, 1),
}
# float32 has no matrix units at full precision: small tiles, the same on every chip
_ATTEND_FLOAT32 = {
    16: AttendLaunch(64, 32, 4, 2),
    32: AttendLaunch(64, 32, 4, 2),
    64: AttendLaunch(64, 32, 4, 2),
    128: AttendLaunch(32, 32, 4, 1),
    256: AttendLaunch(16, 32, 4, 1),
}


def attend_launch(head_dim: int, itemsize: int, block_m: int, device: torch.device) -> AttendLaunch:
    """The row of the table for these inputs, with no more queries a program than a query block has."""
    row = _ATTEND_FLOAT32[padded(head_dim)] if itemsize == 4 else _ATTEND[chip_class(device), itemsize, padded(head_dim)]
    rows = max(16, min(row.rows, block_m))
    # with fewer rows than the row of the table has, more than four warps would only wait for each other
    return AttendLaunch(rows, row.tile_n, row.num_warps if rows == row.rows else min(4, row.num_warps), row.num_stages)


def tile_warps(elements: int) -> int:
    """Warps for a float32 tile that a program holds in registers: 32 to 64 registers of it a thread."""
    return max(1, min(8, elements // 1024))


def row_warps(size: int) -> int:
    """Warps for a program that holds one row of ``size`` block entries."""
    return max(1, min(16, size // 256))


@lru_cache(maxsize=None)
def chip_class(device: torch.device) -> str:
    """``small``, ``large`` or ``hip``: what decides how much a program may hold."""
    if device.type != "cuda":
        return "small"
    if torch.version.hip:
        return "hip"
    return "large" if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3)) else "small"
