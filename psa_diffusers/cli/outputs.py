"""Files that are finished when they have their name: written beside it, checked, synced to the disk, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from psa_diffusers.calibration.places import sync_folder

__all__ = [
    "clear_parts",
    "count_frames",
    "digest",
    "is_whole",
    "output_name",
    "strict_json",
    "write_json",
    "write_text",
    "write_video",
]

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# what export_to_video asks ffmpeg for, into a pipe: neither a full disk nor a limit stops a pipe
_ENCODE = "-i - -vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -c:v h264 -crf 25 -pix_fmt yuv420p -f mp4"
_INTO_PIPE = "-movflags frag_keyframe+empty_moov -"


def output_name(index: int, prompt: str, seed: int, settings: Mapping[str, Any]) -> str:
    """Name of the files of one prompt: the same settings give the same name, other settings another."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "prompt"
    _check_finite(settings)
    key = json.dumps([prompt, settings], sort_keys=True, default=str)
    return f"{index:03d}-{words}-seed{seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write an .mp4 and read its frames back. A file with the final name is always whole.

    Args:
        path: Where to write it.
        frames: ``[frames, height, width, 3]`` float in [0, 1].
        fps: Frames per second.

    Raises:
        ValueError: If a value is NaN or infinite.
        OSError: If not every frame can be read back. The message says how much room was missing, or that the encoder
            failed. Nothing has the final name then.
    """
    from diffusers.utils import export_to_video

    wrong = sum(not np.isfinite(frame).all() for frame in frames)
    if wrong:
        raise ValueError(f"{wrong} of {len(frames)} frames hold NaN or inf: {path.name} is not written")
    with _part_of(path, path.suffix) as part:
        cause: OSError | None = None
        try:
            export_to_video(list(frames), str(part), fps=fps, macro_block_size=2)
        except OSError as error:  # the pipe to the encoder broke
            cause = error
        found = count_frames(part)
        if cause or found != len(frames):
            part.unlink(missing_ok=True)  # its room counts as free
            told = _missing_room(path, _encoded_size(frames, fps), "about ")
            told = told or (
                f"the encoder failed or was killed: {found} of {len(frames)} frames of {path} can be read back. ffmpeg "
                "may have said why above; start again"
            )
            raise OSError(told) from cause
        _publish(part, path)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record in one move: its existence says that the run is finished.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON does not know.
        OSError: If it cannot be written. Nothing has the final name then.
    """
    write_text(path, strict_json(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in one move; errors as in `write_json`."""
    # a name that is no UTF-8, of a folder say, becomes an escape, which JSON reads as what it was
    content = text.encode("utf-8", "backslashreplace")
    with _part_of(path) as part:
        try:
            part.write_bytes(content)
            _publish(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in _NO_ROOM and (told := _missing_room(path, len(content))):
                raise OSError(told) from error
            raise


def strict_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that every parser takes.

    Raises:
        ValueError: If a number is NaN or infinite. The message says where.
    """
    _check_finite(value)
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def count_frames(path: Path) -> int:
    """Return how many frames of a video can be decoded before the first that cannot; 0 if it is no video."""
    from imageio_ffmpeg import read_frames

    strict = ["-xerror", "-err_detect", "explode"]  # without them a damaged frame is painted over
    count = 0
    try:
        reader = read_frames(str(path.absolute()), pix_fmt="gray", bits_per_pixel=8, input_params=strict)
        next(reader)  # what the header says
        for _ in reader:
            count += 1
    except (OSError, RuntimeError):  # no video, or it ends inside a frame
        pass
    return count


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(video: Path, record: Path) -> bool:
    """Whether a record can be read and its video is what was written, or has as many frames as it says."""
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        frames = told["frames"][0]
        return digest(video) == told.get("video_sha256") or count_frames(video) == frames > 0
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return False  # no record of ours


def clear_parts(folder: Path, names: Iterable[str]) -> None:
    """Remove what processes that were killed have left of the files of some names, which hold no dots."""
    ours = set(names)
    for part in list(folder.glob(".*.part*")):
        if part.name.split(".")[1] in ours:
            part.unlink(missing_ok=True)


@contextmanager
def _part_of(path: Path, ending: str = "") -> Iterator[Path]:
    """Give the path of a file to write beside the final one. It goes when the block ends, unless it has its name."""
    # without the final ending, so that nobody who looks for records finds it; the encoder goes by the ending
    # absolute: ffmpeg takes the word before a colon for a protocol. The token: processes of two containers may have
    # the same number
    path = path.absolute()
    part = path.with_name(f".{path.name}.part{secrets.token_hex(4)}{ending}")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _publish(part: Path, path: Path) -> None:
    """Give a file its final name once the disk has it."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.absolute().parent)


def _missing_room(path: Path, needed: int, about: str = "") -> str | None:
    """Say how much room a file of a size lacks, None if it has enough. Found by writing so much: quotas count too."""
    fits, reason = 0, None
    with _part_of(path) as probe:
        try:
            with probe.open("wb", buffering=0) as file:
                while fits < needed:
                    fits += file.write(bytes(min(needed - fits, 1 << 20)))
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            reason = error.strerror
    if reason is None:
        return None
    return (
        f"no room for {path}: {about}{needed - fits:,} bytes are missing of {about}{needed:,} ({reason}). Make room or "
        "raise the limit, and start again: what is finished is kept"
    )


def _encoded_size(frames: np.ndarray, fps: int) -> int:
    """Return about how many bytes a video takes."""
    from imageio_ffmpeg import get_ffmpeg_exe

    height, width = frames.shape[1:3]
    given = f"-v error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} {_ENCODE} {_INTO_PIPE}"
    pixels = (np.asarray(frames) * 255).astype(np.uint8).tobytes()
    return len(subprocess.run([get_ffmpeg_exe(), *given.split()], input=pixels, capture_output=True).stdout)


def _check_finite(value: Any) -> None:
    for where, number in _numbers(value, ""):
        if not math.isfinite(number):
            raise ValueError(f"{where or 'the value'} is {number}, and JSON knows finite numbers only")


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """Give every float inside plain values, with its place."""
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{where}[{index}]")
