"""A schedule that is handed in: of this call, in the form that the kernels read, and without a number out of range."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.types import Factors, Schedule, id_dtype

_REMEDY = "Leave it out to decide anew, or pass one as psa_attention returned it; schedule[heads] is that of some heads"

# schedules whose numbers are right, and the versions of their parts: written to, a part has another version
_RIGHT: WeakKeyDictionary[Schedule, tuple[int, ...]] = WeakKeyDictionary()


def checked_schedule(schedule: Schedule, q: Tensor, layout: Layout, factors: Factors) -> Schedule:
    """The schedule with its parts contiguous, as the kernels read them; refuses one of another call.

    The numbers in it are not looked at: `check_numbers` does.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule that psa_attention returned, got a {type(schedule).__name__}")
    ids, offsets = schedule.block_ids, schedule.offsets
    for name, part in (("block_ids", ids), ("offsets", offsets)):
        if not isinstance(part, Tensor):
            raise TypeError(f"schedule.{name} must be a tensor, got a {type(part).__name__}. {_REMEDY}")
    shape = (q.shape[0], q.shape[1], layout.num_query_blocks, layout.num_key_blocks)
    expected = {
        "[B, H, M, N]": shape,
        "[B, H, M, F + 1]": (*shape[:3], len(factors) + 1),
        "block_n": layout.block_n,
        "factors": factors,
        "device": q.device,
        "device of the offsets": q.device,
        "dtype of the ids": id_dtype(shape[3]),
        "dtype of the offsets": torch.int32,
    }
    has = (
        tuple(ids.shape), tuple(offsets.shape), schedule.block_n, schedule.factors, ids.device, offsets.device,
        ids.dtype, offsets.dtype,
    )  # fmt: skip
    found = dict(zip(expected, has, strict=True))
    if found != expected:
        other = [name for name in expected if found[name] != expected[name]]
        told = [", ".join(f"{name} = {each[name]}" for name in other) for each in (expected, found)]
        raise ValueError(f"schedule is of another call: expected {told[0]}; got {told[1]}. {_REMEDY}")
    if ids.is_contiguous() and offsets.is_contiguous():
        return schedule
    return replace(schedule, block_ids=ids.contiguous(), offsets=offsets.contiguous())


@torch.compiler.disable
def check_numbers(schedule: Schedule) -> None:
    """Refuse numbers that would be read out of range, or twice, once a schedule: this waits for the GPU.

    What this call path made itself, and nobody wrote to, is known to be right.
    """
    if _RIGHT.get(schedule) == _versions(schedule):
        return
    ids, offsets = schedule.block_ids, schedule.offsets
    blocks = ids.shape[-1]
    ascends = (offsets.diff(dim=-1) >= 0).all() & (offsets[..., 0] == 0).all() & (offsets[..., -1] <= blocks).all()
    if not ascends:
        raise ValueError(f"schedule.offsets must rise from 0 to at most {blocks}, the number of key blocks. {_REMEDY}")
    kept = torch.arange(blocks, device=ids.device) < offsets[..., -1:]
    if not (((ids >= 0) & (ids < blocks)) | ~kept).all():
        read = ids[kept]
        raise ValueError(
            f"schedule.block_ids must lie in 0 to {blocks - 1}, the key blocks of this call, got ids from "
            f"{int(read.min())} to {int(read.max())}. {_REMEDY}"
        )
    if not ((schedule.to_level_map() > 0).sum(-1) == offsets[..., -1]).all():
        raise ValueError(f"schedule.block_ids must name a key block once a row, and a row names one twice. {_REMEDY}")
    know_right(schedule)


def know_right(schedule: Schedule) -> None:
    """Remember that the numbers of a schedule are right: a stage has made it."""
    if not torch.compiler.is_compiling():
        _RIGHT[schedule] = _versions(schedule)


def _versions(schedule: Schedule) -> tuple[int, ...]:
    """How often each part was written to; tensors of inference mode do not count."""
    parts = (schedule.block_ids, schedule.offsets)
    return tuple(-1 if part.is_inference() else part._version for part in parts)
