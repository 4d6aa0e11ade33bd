"""What a recording in the making holds: a line a record, written after its tensors, so that a kill loses the last only.

A line has a checksum of itself and one of each tensor. Reading stops at the first line that is torn, that does not
begin where the one before it ended, or whose tensors are not as they were written. Everything before it is whole.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import IO, Any

from psa_diffusers.presets.values import is_int

__all__ = ["ITEM_SIZES", "Line", "Span", "decode_line", "encode_line", "places", "read_lines"]

ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by the name of its dtype in safetensors."""

_CHUNK = 2**24


@dataclass(frozen=True)
class Span:
    """A tensor in the data file.

    Attributes:
        dtype: Name of its dtype in safetensors.
        shape: Its shape.
        start: Position of its first byte in the file.
        checksum: CRC-32 of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    checksum: int

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZES or not all(
            is_int(number) and number >= 0 for number in (*self.shape, self.start, self.checksum)
        ):
            raise ValueError("no tensor of a recording")

    @property
    def end(self) -> int:
        """Position behind its last byte."""
        return self.start + math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Line:
    """One step of a recording: a record with its tensors, or tensors that moved to make room for the header.

    Attributes:
        room: Bytes before the data, for the header.
        spans: The tensors that stand at a new place behind all others, by key, in their order.
        record: The record; None if tensors moved.
    """

    room: int
    spans: dict[str, Span]
    record: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        is_record = self.record is None or (isinstance(self.record, dict) and isinstance(self.record.get("key"), str))
        if not (is_int(self.room) and self.spans and is_record):
            raise ValueError("no line of a recording")

    @property
    def end(self) -> int:
        """Position behind the data."""
        return max(span.end for span in self.spans.values())


def places(lines: Iterable[Line]) -> dict[str, Span]:
    """Where the tensors are after all lines, in the order of the file."""
    spans: dict[str, Span] = {}
    for line in lines:
        spans |= line.spans
    return dict(sorted(spans.items(), key=lambda item: item[1].start))


def encode_line(line: Line) -> bytes:
    """Return a line as bytes, with its checksum and its end."""
    text = json.dumps(asdict(line)).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode_line(text: bytes) -> Line:
    """Read a line, without its end.

    Raises:
        ValueError: If it is torn, or no such line.
    """
    if int(text[:8], 16) != zlib.crc32(text[9:]):
        raise ValueError("the checksum of the line is wrong")
    try:
        values = json.loads(text[9:])
        spans = {key: Span(**{**span, "shape": tuple(span["shape"])}) for key, span in values["spans"].items()}
        return Line(**{**values, "spans": spans})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no line of a recording: {error}") from error


def read_lines(journal: bytes, data: IO[bytes]) -> list[Line]:
    """Return the lines that hold for a data file, from the first on.

    Args:
        journal: The lines.
        data: The data file.
    """
    lines: list[Line] = []
    for text in journal.split(b"\n")[:-1]:
        try:
            line = decode_line(text)
        except ValueError:
            break
        # where all tensors moved, the header has all the room before them
        position = max(lines[-1].end, line.room) if lines else line.room
        for span in line.spans.values():
            if span.start != position or not _is_whole(span, data):
                return lines
            position = span.end
        lines.append(line)
    return lines


def _is_whole(span: Span, data: IO[bytes]) -> bool:
    """Whether the bytes of a tensor are those that were written."""
    data.seek(span.start)
    left, checksum = span.end - span.start, 0
    while left and (chunk := data.read(min(left, _CHUNK))):
        checksum = zlib.crc32(chunk, checksum)
        left -= len(chunk)
    return not left and checksum == span.checksum
