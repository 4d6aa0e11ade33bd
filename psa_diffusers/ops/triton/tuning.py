"""How to launch each kernel on which chip: a table, so that the first call costs nothing and every run does the same.

Every row compiles, fits the shared memory of every chip of its class and, with blocks of 128, spills no registers
(tests/ops/triton/test_compile.py; on Hopper smaller blocks spill none either, on other chips a few bytes). Where a
row was measured against others, it says so.
"""

from dataclasses import dataclass
from functools import cache

import torch

from psa_diffusers.ops.triton.launch import padded


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


# (matrix unit, padded head dimension) -> the launch for float16 and bfloat16 and the largest query block
_ATTEND = {
    # mma: sm_80, sm_86, sm_89, sm_120, and whatever we do not know; the least of them has 99 KiB of shared memory
    ("mma", 16): AttendLaunch(128, 64, 8, 3),
    ("mma", 32): AttendLaunch(128, 64, 8, 3),
    ("mma", 64): AttendLaunch(128, 64, 8, 3),
    ("mma", 128): AttendLaunch(128, 64, 8, 2),
    ("mma", 256): AttendLaunch(64, 32, 8, 2),
    # wgmma: sm_90, 227 KiB; a tile of 128 cells would fit, but not into the registers
    ("wgmma", 16): AttendLaunch(128, 64, 8, 3),
    ("wgmma", 32): AttendLaunch(128, 64, 8, 3),
    ("wgmma", 64): AttendLaunch(128, 64, 8, 3),
    ("wgmma", 128): AttendLaunch(128, 64, 8, 2),
    ("wgmma", 256): AttendLaunch(128, 32, 8, 2),
    # tcgen05: sm_100, sm_103, 227 KiB
    ("tcgen05", 16): AttendLaunch(128, 64, 8, 3),
    ("tcgen05", 32): AttendLaunch(128, 64, 8, 3),
    ("tcgen05", 64): AttendLaunch(128, 64, 8, 2),
    ("tcgen05", 128): AttendLaunch(128, 32, 8, 2),
    ("tcgen05", 256): AttendLaunch(64, 32, 8, 2),
    # mfma: gfx9, 64 KiB
    ("mfma", 16): AttendLaunch(128, 64, 4, 2),
    ("mfma", 32): AttendLaunch(128, 64, 4, 2),
    ("mfma", 64): AttendLaunch(128, 64, 4, 2),
    ("mfma", 128): AttendLaunch(128, 64, 8, 1),
    ("mfma", 256): AttendLaunch(64, 32, 8, 1),
}
# float32 at full precision has no matrix unit on most chips: small tiles, the same everywhere
_ATTEND_FLOAT32 = {
    16: AttendLaunch(32, 32, 4, 2),
    32: AttendLaunch(32, 32, 4, 2),
    64: AttendLaunch(32, 32, 4, 2),
    128: AttendLaunch(16, 32, 4, 1),
    256: AttendLaunch(16, 32, 4, 1),
}


def attend_launch(head_dim: int, itemsize: int, block_m: int, device: torch.device) -> AttendLaunch:
    """The row of the table for these inputs, with no more queries a program than a query block has."""
    row = _ATTEND_FLOAT32[padded(head_dim)] if itemsize == 4 else _ATTEND[matrix_unit(device), padded(head_dim)]
    rows = max(16, min(row.rows, block_m))
    # with fewer rows than the row of the table has, more than four warps would only wait for each other
    return AttendLaunch(rows, row.tile_n, row.num_warps if rows == row.rows else min(4, row.num_warps), row.num_stages)


@dataclass(frozen=True)
class ImportanceLaunch:
    """Attributes:
    rows: Query cells a program, at least.
    columns: Key cells an iteration, at least.
    num_warps: Warps a program.
    num_stages: Iterations in flight.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class CovarianceLaunch:
    """Attributes:
    pairs: Pairs of cells an iteration, where a coarse cell is two fine ones.
    cells: Cells an iteration, where it is more.
    columns: Channels of the values a program, at most.
    num_warps: Warps a program.
    num_stages: Iterations in flight.
    """

    pairs: int
    cells: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PyramidLaunch:
    """Attributes:
    span: Tokens that one thread row merges, two by two, without talking to another.
    channels: Channels a thread.
    registers: A limit to the registers a thread, so that more programs fit, or None.
    """

    span: int
    channels: int
    registers: int | None = None


# (matrix unit, padded head dimension) -> launch; "" for chips without a row of their own.
# The rows of wgmma were the best, or within a tenth of it, on most of the presets that were timed on an H200:
# docs/benchmarks/tuning.jsonl
IMPORTANCE = {
    **{("", dim): ImportanceLaunch(64, 64, 4, 2) for dim in (16, 32, 64, 128, 256)},
    ("mma", 64): ImportanceLaunch(64, 64, 4, 3),
    ("tcgen05", 128): ImportanceLaunch(64, 64, 4, 3),  # with two in flight it spills
    ("wgmma", 64): ImportanceLaunch(128, 128, 4, 2),
    ("wgmma", 128): ImportanceLaunch(128, 128, 4, 2),
}
COVARIANCE = {
    **{("", dim): CovarianceLaunch(64, 64, 128, 4, 1) for dim in (16, 32, 64)},
    **{("", dim): CovarianceLaunch(32, 32, 128, 8, 1) for dim in (128, 256)},
    ("wgmma", 64): CovarianceLaunch(64, 128, 64, 8, 2),
    ("wgmma", 128): CovarianceLaunch(32, 64, 128, 8, 2),
}
PYRAMID = {
    **{("", dim): PyramidLaunch(16, 8) for dim in (16, 32, 64, 128, 256)},
    ("wgmma", 64): PyramidLaunch(8, 8),
    ("wgmma", 128): PyramidLaunch(16, 8, 128),
}
# float32 at full precision has no matrix unit on most chips, and takes twice the room
_FLOAT32 = {
    ImportanceLaunch: ImportanceLaunch(64, 64, 4, 2),
    CovarianceLaunch: CovarianceLaunch(32, 32, 64, 8, 1),
    PyramidLaunch: PyramidLaunch(8, 8),
}


def launch_of(table: dict, head_dim: int, itemsize: int, device: torch.device):
    """The row of ``IMPORTANCE``, ``COVARIANCE`` or ``PYRAMID`` for these inputs."""
    row = table.get((matrix_unit(device), padded(head_dim))) or table["", padded(head_dim)]
    return _FLOAT32.get(type(row), row) if itemsize == 4 else row


def importance_launch(head_dim: int, itemsize: int, block_n: int, device: torch.device) -> ImportanceLaunch:
    """The row for these inputs; a wide tile of a chip's own row would hold too many key blocks below 64 tokens."""
    if block_n < 64 and itemsize < 4:
        return IMPORTANCE["", padded(head_dim)]
    return launch_of(IMPORTANCE, head_dim, itemsize, device)


def tile_warps(elements: int) -> int:
    """Warps for a float32 tile that a program holds in registers: 32 to 64 registers of it a thread."""
    return max(1, min(8, elements // 1024))


def row_warps(size: int, a_warp: int) -> int:
    """Warps for a program that holds one row of ``size`` block entries, ``a_warp`` of them each."""
    return max(1, min(16, size // a_warp))


@cache
def matrix_unit(device: torch.device) -> str:
    """``mma``, ``wgmma``, ``tcgen05`` or ``mfma``: what decides how much a program may hold."""
    if device.type != "cuda":
        return "mma"
    if torch.version.hip:
        return "mfma"
    major, minor = torch.cuda.get_device_capability(device)
    # the consumer's sm_120 has neither of the newer units
    return {(9, 0): "wgmma", (10, 0): "tcgen05", (10, 3): "tcgen05"}.get((major, minor), "mma")
