"""Record q, k and v of the self-attentions of a running pipeline in a file, to judge a choice of levels."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from psa_diffusers.calibration.tap import Call, tap_qkv
from psa_diffusers.calibration.writer import SafetensorsWriter
from psa_diffusers.presets import check_ranges, in_ranges

__all__ = ["Recording", "record_qkv"]

logger = logging.getLogger("psa_diffusers")


@dataclass
class Recording:
    """What `record_qkv` has written so far.

    Attributes:
        path: The file. It is there once the context has been left.
        records: One dict a recorded call: `key` (its tensors are `key + "q"`, `"k"`, `"v"`) and the fields of `Call`;
            after the context also `branch`, see `record_qkv`.
        num_bytes: Size of the tensors.
        complete: Whether nothing was left out for want of space.
    """

    path: Path
    records: list[dict[str, Any]]
    num_bytes: int = 0
    complete: bool = True


@contextmanager
def record_qkv(
    pipe: Any,
    path: str | Path,
    *,
    steps: str | int | Sequence[int] | None = None,
    layers: str | int | Sequence[int] | None = None,
    heads: str | int | Sequence[int] | None = None,
    max_gib: float = 4.0,
) -> Iterator[Recording]:
    """Write q, k, v of the self-attentions to a safetensors file while the pipeline runs inside the context.

        with record_qkv(pipe, "qkv.safetensors", steps="0,-1", heads="0:4"):
            pipe(prompt)

    The tensors `[B, H, L, D]` are those that enter the attention, normed and rotated, in the dtype and the order of
    the model. What the pipeline computes does not change, whether PSA is on or off; the projections of a recorded call
    are computed a second time. Compiled denoisers run without their compiled code meanwhile. Tensors go to the disk as
    they come, so that memory holds those of one call.

    Metadata of the file: `grid`, `text_tokens`, `text_first` (of the first record), `complete`, and `records`, a JSON
    list with the place of every record (`Recording.records`). `branch` names the guidance branches of a record along
    the batch: `cond`, `uncond`, or `uncond,cond` where both run in one batch, the one half behind the other.

    Args:
        pipe: A pipeline with a denoiser of a known family.
        path: The file; one that exists is replaced when the context is left.
        steps: Denoising steps to record, as in `steps` of a preset (`0`, `-1`, `10%:50%`, several with commas), or a
            list of numbers. None records all.
        layers: Self-attentions of each denoiser to record, likewise.
        heads: Heads to keep, likewise.
        max_gib: Largest size of the tensors. What would go beyond is left out, with one warning.

    Yields:
        A `Recording` that grows while the pipeline runs.

    Raises:
        TypeError: If the pipeline has no denoiser of a known family.
        ValueError: If a range is malformed or `max_gib` is not positive.
        RuntimeError: If nothing was recorded. The message says why.
            When the pipeline raises, what was recorded until then is written all the same.
    """
    where = {"steps": _as_ranges(steps), "layers": _as_ranges(layers)}
    kept_heads = _as_ranges(heads)
    if not max_gib > 0:
        raise ValueError(f"max_gib must be positive, got {max_gib!r}")
    recording = Recording(Path(path), [])
    writer = SafetensorsWriter(recording.path)

    def is_wanted(step: int, num_steps: int | None, layer: int, num_layers: int) -> bool:
        return recording.complete and (
            in_ranges(where["steps"], step, num_steps) and in_ranges(where["layers"], layer, num_layers)
        )

    def keep(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        index = [head for head in range(q.shape[1]) if in_ranges(kept_heads, head, q.shape[1])]
        size = 3 * q[:, index].numel() * q.element_size()
        if size == 0:
            return
        if recording.num_bytes + size > max_gib * 2**30:
            recording.complete = False
            logger.warning(
                "record_qkv: %s is full after %d calls (max_gib=%g); choose fewer steps, layers or heads",
                path, len(recording.records), max_gib,
            )  # fmt: skip
            return
        key = f"call{call.call}.step{call.step:03d}.{call.denoiser}.layer{call.layer:02d}.forward{call.forward}."
        key += "" if call.sample is None else f"sample{call.sample[0]}."
        for part, x in zip("qkv", (q, k, v), strict=True):
            writer.add(key + part, x[:, index])
        recording.num_bytes += size
        sample, count = call.sample or (0, len(q))
        guided = count % 2 == 0 and getattr(pipe, "guidance_scale", 1.0) > 1
        halves = "uncond,cond" if call.sample is None else "uncond" if sample < count // 2 else "cond"
        branch = halves if guided else "cond"
        recording.records.append({"key": key, **asdict(call), "grid": list(call.grid), "branch": branch})

    raised = True
    try:
        with tap_qkv(pipe, is_wanted, keep) as tape:
            yield recording
        raised = False
    finally:
        if recording.records:
            _name_branches(recording.records, tape.forwards)
            writer.finish(_metadata(recording))
        else:
            writer.drop()
    if not recording.records and not raised:
        raise RuntimeError(
            f"nothing was recorded: the denoiser ran {sum(tape.forwards.values())} times, and "
            + (f"was left out because {tape.left_out[0]}" if tape.left_out else f"no call matched {where}")
        )


def _as_ranges(given: str | int | Sequence[int] | None) -> str:
    if given is None:
        return ":"
    if not isinstance(given, (str, int)):
        given = ",".join(map(str, given))
    return check_ranges(given)


def _name_branches(records: list[dict[str, Any]], forwards: Mapping[tuple[int, int, str], int]) -> None:
    """Where a step had two forwards, diffusers ran the prompt's first and the negative prompt's second."""
    for record in records:
        if forwards[record["call"], record["step"], record["denoiser"]] > 1:
            record["branch"] = ("cond", "uncond")[record["forward"] % 2]


def _metadata(recording: Recording) -> dict[str, str]:
    first = recording.records[0]
    return {
        "grid": " ".join(map(str, first["grid"])),
        "text_tokens": str(first["text_tokens"]),
        "text_first": str(first["text_first"]).lower(),
        "complete": str(recording.complete).lower(),
        "records": json.dumps(recording.records),
    }
