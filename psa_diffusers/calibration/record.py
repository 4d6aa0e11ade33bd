"""Record q, k and v of the self-attentions of a running pipeline in a file, to judge a choice of levels."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.calibration.places import free_name
from psa_diffusers.calibration.tap import Call, tap_qkv
from psa_diffusers.calibration.writer import HeaderFullError, SafetensorsWriter, is_interrupted
from psa_diffusers.presets import check_ranges, in_ranges

__all__ = ["Recording", "record_qkv", "recover_recording"]

logger = logging.getLogger("psa_diffusers")


@dataclass
class Recording:
    """What `record_qkv` has written so far.

    Attributes:
        path: The file. It is there once the context has been left.
        records: One dict a recorded call: `key` (its tensors are `key + "q"`, `"k"`, `"v"`), the fields of `Call`,
            `branch` (see `record_qkv`) and `finite`, whether all values are finite numbers.
        num_bytes: Size of the tensors.
        complete: Whether nothing was left out: for want of space, or because the context was left by an exception.
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

    An interruption loses nothing: when the pipeline raises, or a disk is full, what was recorded until then becomes the
    file. Before the end it stands in `NAME.part` and `NAME.part.jsonl` beside the file. If the process is killed,
    `recover_recording` makes a file of them; so does the next `record_qkv` of that path.

    Metadata of the file: `grid`, `text_tokens`, `text_first` (of the first record), `complete`, and `records`, a JSON
    list with the place of every record (`Recording.records`). `branch` names the guidance branches of a record along
    the batch: `cond`, `uncond`, or `uncond,cond` where both run in one batch, the one half behind the other.

    Args:
        pipe: A pipeline with a denoiser of a known family.
        path: The file; one that exists is replaced when the context is left. Checked before the pipeline runs.
        steps: Denoising steps to record, as in `steps` of a preset (`0`, `-1`, `10%:50%`, several with commas), or a
            list of numbers. None records all.
        layers: Self-attentions of each denoiser to record, likewise.
        heads: Heads to keep, likewise. A place that a run does not have is told in a warning.
        max_gib: Largest size of the tensors. What would go beyond is left out, with one warning.

    Yields:
        A `Recording` that grows while the pipeline runs.

    Raises:
        TypeError: If the pipeline has no denoiser of a known family.
        ValueError: If a range is malformed or `max_gib` is not positive.
        OSError: If the file cannot be written: before the pipeline runs if that can be known, else at the call that
            finds the disk full.
        RuntimeError: If nothing was recorded. The message says why.
    """
    where = {"steps": _as_ranges(steps), "layers": _as_ranges(layers), "heads": _as_ranges(heads)}
    if isinstance(max_gib, bool) or not isinstance(max_gib, (int, float)) or not max_gib > 0:
        raise ValueError(f"max_gib must be positive, a number of GiB such as 4, got {max_gib!r}")
    recording = Recording(Path(path), [])
    writer = _begin(recording.path)
    told: set[Any] = set()

    def is_there(kind: str, place: int, count: int | None) -> bool:
        if (kind, count) not in told:
            told.add((kind, count))
            _warn_of_missing(kind, where[kind], count)
        return in_ranges(where[kind], place, count)

    def is_wanted(step: int, num_steps: int | None, layer: int, num_layers: int) -> bool:
        wanted = [is_there("steps", step, num_steps), is_there("layers", layer, num_layers)]
        return recording.complete and all(wanted)

    def keep(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        index = [head for head in range(q.shape[1]) if is_there("heads", head, q.shape[1])]
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
        sample, count = call.sample or (0, len(q))
        guided = count % 2 == 0 and getattr(pipe, "guidance_scale", 1.0) > 1
        halves = "uncond,cond" if call.sample is None else "uncond" if sample < count // 2 else "cond"
        branch = halves if guided else "cond"
        kept = {key + part: x[:, index] for part, x in zip("qkv", (q, k, v), strict=True)}
        finite = all(bool(torch.isfinite(x).all()) for x in kept.values())
        if not finite and "finite" not in told:
            told.add("finite")
            logger.warning(
                "record_qkv: step %d, layer %d of %s has values that are not finite, and so may others (`finite` of a "
                "record); likely causes are a dtype that overflows, a LoRA, or broken weights",
                call.step, call.layer, call.denoiser,
            )  # fmt: skip
        record = {"key": key, **asdict(call), "grid": list(call.grid), "branch": branch, "finite": finite}
        try:
            writer.add(record, kept)
        except HeaderFullError:
            recording.complete = False
            logger.warning(
                "record_qkv: %s is full after %d calls: a safetensors file names no more; choose fewer steps or layers",
                path, len(recording.records),
            )  # fmt: skip
            return
        except OSError as error:
            recording.complete = False
            raise OSError(
                error.errno,
                f"record_qkv cannot write {path}: {error.strerror}. {size / 2**20:.3g} MiB were to be added; the file "
                f"has the {len(recording.records)} calls before. Make room, or choose fewer steps, layers or heads",
            ) from error
        recording.records, recording.num_bytes = writer.records, writer.num_bytes

    raised = True
    try:
        with tap_qkv(pipe, is_wanted, keep) as tape:
            yield recording
        raised = False
    finally:
        recording.records, recording.num_bytes = writer.records, writer.num_bytes
        recording.complete = recording.complete and not raised
        if recording.records:
            _name_branches(recording.records, tape.forwards)
            _finish(writer, _metadata(recording.records, complete=recording.complete), recording.path)
        else:
            writer.drop()
    if not recording.records and not raised:
        raise RuntimeError(
            f"nothing was recorded: the denoiser ran {sum(tape.forwards.values())} times, and "
            + (f"was left out because {tape.left_out[0]}" if tape.left_out else f"no call matched {where}")
        )


def recover_recording(path: str | Path) -> Path:
    """Make a file of what `record_qkv` had recorded when its process was killed.

    Every call whose tensors are whole is in it; `complete` in its metadata is false.

    Args:
        path: The file that was to be recorded; `NAME.part` and `NAME.part.jsonl` stand beside it. It is not touched.

    Returns:
        The new file: `qkv.interrupted.safetensors` for `qkv.safetensors`.

    Raises:
        FileNotFoundError: If there is no interrupted recording of that path.
        OSError: If the file cannot be written, or is being recorded at this moment.
        ValueError: If no call in it is whole.
    """
    path = Path(path)
    if not is_interrupted(path):
        raise FileNotFoundError(f"no interrupted recording of {path}: nothing is named {path.name}.part beside it")
    writer = SafetensorsWriter(path, resume=True)
    try:
        records = writer.records
        if not records:
            raise ValueError(f"no call in the interrupted recording of {path} is whole: record again")
        runs: Counter[tuple[int, str]] = Counter()
        for record in records:
            run = record["call"], record["denoiser"]
            runs[run] = max(runs[run], record["forward"] + 1)
        _name_branches(
            records, {(r["call"], r["step"], r["denoiser"]): runs[r["call"], r["denoiser"]] for r in records}
        )
        found = free_name(writer.path, "interrupted")
        writer.finish(_metadata(records, complete=False), found)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{writer.part} is no interrupted recording: {error!r}; record again") from error
    finally:
        writer.close()
    logger.info("recover_recording: %d calls in %s", len(records), found)
    return found


def _begin(path: Path) -> SafetensorsWriter:
    """Open the writer of a file; what a killed one left becomes a file of its own."""
    if is_interrupted(path):
        try:
            found = recover_recording(path)
            logger.warning("record_qkv: an earlier recording of %s was interrupted; its calls are in %s", path, found)
        except ValueError as error:
            logger.warning("record_qkv: %s", error)
    return SafetensorsWriter(path)


def _finish(writer: SafetensorsWriter, metadata: Mapping[str, str], path: Path) -> None:
    try:
        writer.finish(metadata)
    except OSError as error:
        raise OSError(
            error.errno,
            f"record_qkv cannot finish {path}: {error.strerror}. The {len(writer.records)} recorded calls are in "
            f"{writer.part.name} beside it; when the cause is gone, recover_recording makes a file of them",
        ) from error


def _warn_of_missing(kind: str, ranges: str, count: int | None) -> None:
    """Name the places of a range that a run does not have."""
    missing = [
        part for part in ranges.split(",") if not any(in_ranges(part, place, count) for place in range(count or 0))
    ]
    if count is None:
        missing = [part for part in ranges.split(",") if "-" in part or "%" in part]
    if missing:
        there = "an unknown number of" if count is None else str(count)
        last = "" if not count else f", 0 to {count - 1}"
        logger.warning(
            "record_qkv: %s=%r matches nothing at %s: there are %s %s%s",
            kind, ranges, " and ".join(missing), there, kind, last,
        )  # fmt: skip


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


def _metadata(records: Sequence[Mapping[str, Any]], *, complete: bool) -> dict[str, str]:
    first = records[0]
    return {
        "grid": " ".join(map(str, first["grid"])),
        "text_tokens": str(first["text_tokens"]),
        "text_first": str(first["text_first"]).lower(),
        "complete": str(complete).lower(),
        "records": json.dumps(records),
    }
