"""Write a safetensors file record by record, so that no interruption, kill or full disk spoils what is there."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from psa_diffusers.calibration.journal import Line, Span, encode_line, places, read_lines
from psa_diffusers.calibration.places import check_place, lock, sync_folder

__all__ = ["HeaderFullError", "SafetensorsWriter", "is_interrupted"]

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LEAST_ROOM, _MOST_ROOM = 2**16, 2**20
"""Room for the header at first: a 64th of the first record, within these."""

_LARGEST_HEADER = 100_000_000
"""What safetensors reads at most."""

_CHUNK = 2**24


class HeaderFullError(Exception):
    """The header would grow beyond what safetensors reads."""


class SafetensorsWriter:
    """A safetensors file in the making.

    Beside the file stand `NAME.part`, with room for the header and then the data, and `NAME.part.jsonl`, which says
    what is whole (`journal`). `finish` writes the header into its room and gives `NAME.part` its name: the data are
    written once. If the process is killed before, the next writer of that path finds the two and can finish them.

    Args:
        path: The file. It appears, or is replaced, in `finish`.

    Attributes:
        path: The file, links followed.
        part: The data beside it.

    Raises:
        OSError: If the file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self.part, self._journal_path = _beside(self.path)
        check_place(self.path)
        # each line, and where the journal goes on behind it: one list, so that an interruption finds both or neither
        self._log: list[tuple[Line, int]] = []
        self._first_room = _LEAST_ROOM
        self._journal = _open(self._journal_path)
        try:
            # the lock of the journal is that of both
            self._lock()
            self._data = _open(self.part)
        except BaseException:
            self._journal.close()
            raise
        try:
            if resume:
                end = 0
                for line in read_lines(self._journal.read(), self._data):
                    end += len(encode_line(line))
                    self._log.append((line, end))
            else:
                self._journal.truncate(0)
                self._data.truncate(0)
                # on the disk before the pipeline runs: the header will have its room however full the disk gets
                _write_at(self._data, 0, bytes(self._first_room))
        except OSError as error:
            (self.close if resume else self.drop)()
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}; make room first") from error
        except BaseException:
            self.close()
            raise
        self._needed = 4096 + sum(_header_size(line.spans, line.record) for line, _ in self._log)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records that are whole, in order."""
        return [line.record for line, _ in self._log if line.record is not None]

    @property
    def num_bytes(self) -> int:
        """Size of their tensors."""
        return self._end - self._room

    @property
    def _room(self) -> int:
        return self._log[-1][0].room if self._log else self._first_room

    @property
    def _end(self) -> int:
        return self._log[-1][0].end if self._log else self._first_room

    def add(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a record with its tensors. An exception, whichever it is, leaves what was there before.

        Args:
            record: Plain values; `key` is a name.
            tensors: Tensors, not empty, by keys that are new.

        Raises:
            HeaderFullError: If no further record fits into a safetensors file.
            TypeError: If a dtype is none of the recorded ones.
        """
        for key, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise TypeError(f"{key} is {tensor.dtype}; a recording holds {', '.join(map(str, _DTYPES))}")
        needed = self._needed + _header_size(tensors, record)
        if not self._log:
            share = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) // 64 // 4096 * 4096
            self._first_room = max(_LEAST_ROOM, min(share, _MOST_ROOM))
            _write_at(self._data, 0, bytes(self._first_room))
        self._make_room(needed)
        position = self._end
        spans = {}
        for key, tensor in tensors.items():
            data = tensor.detach().contiguous().cpu()
            plain = data.reshape(-1).view(torch.uint8).numpy().data
            _write_at(self._data, position, plain)
            spans[key] = Span(_DTYPES[data.dtype], tuple(data.shape), position, zlib.crc32(plain))
            position = spans[key].end
        self._commit(Line(self._room, spans, dict(record)))
        self._needed = needed

    def finish(self, metadata: Mapping[str, str], path: Path | None = None) -> None:
        """Give the file its header and its name.

        Args:
            metadata: Metadata of the file.
            path: Another name in its folder, for what an earlier writer left.

        Raises:
            OSError: If that fails. What was written stays beside the file.
            ValueError: If what an earlier writer left does not hold together.
        """
        try:
            header = self._header(metadata)
            self._make_room(len(header) + 8)
            header = self._header(metadata).ljust(self._room - 8)
            _write_at(self._data, 0, len(header).to_bytes(8, "little") + header)
            self._data.truncate(self._end)
            os.fsync(self._data.fileno())
            # Windows renames no open file
            self._data.close()
            self.part.replace(path or self.path)
            sync_folder(self.path.parent)
            self._journal_path.unlink()
        finally:
            self.close()

    def drop(self) -> None:
        """Write no file, and leave nothing beside it."""
        self._data.close()
        self.part.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)
        self._journal.close()

    def close(self) -> None:
        """Write no file, and leave what is beside it."""
        self._data.close()
        self._journal.close()

    def _lock(self) -> None:
        """Lock the journal: the file of that name, and not one that another writer has just removed."""
        lock(self._journal, self.path)
        while not os.fstat(self._journal.fileno()).st_nlink:
            self._journal.close()
            self._journal = _open(self._journal_path)
            lock(self._journal, self.path)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, Any] = {}
        position = self._room
        for key, span in places(line for line, _ in self._log).items():
            if span.start != position:
                raise ValueError(f"{self.part} does not hold together: nothing stands before {key}")
            position = span.end
            offsets = [span.start - self._room, span.end - self._room]
            entries[key] = {"dtype": span.dtype, "shape": span.shape, "data_offsets": offsets}
        return json.dumps({"__metadata__": dict(metadata), **entries}).encode()

    def _make_room(self, needed: int) -> None:
        """Move tensors from the front to the end until the header has its room, and twice that for what will come."""
        while self._room < needed:
            target = max(needed, min(2 * self._room, _LARGEST_HEADER * 9 // 10))
            spans = places(line for line, _ in self._log)
            front = {key: span for key, span in spans.items() if span.start < target}
            position, moved = self._end, {}
            room = min((span.start for key, span in spans.items() if key not in front), default=max(position, target))
            if room > _LARGEST_HEADER:
                raise HeaderFullError
            if room > position:
                _write_at(self._data, position, bytes(room - position))
                position = room
            for key, span in front.items():
                for offset in range(0, span.end - span.start, _CHUNK):
                    self._data.seek(span.start + offset)
                    chunk = self._data.read(min(_CHUNK, span.end - span.start - offset))
                    _write_at(self._data, position + offset, chunk)
                moved[key] = replace(span, start=position)
                position = moved[key].end
            self._commit(Line(room, moved))

    def _commit(self, line: Line) -> None:
        text = encode_line(line)
        start = self._log[-1][1] if self._log else 0
        _write_at(self._journal, start, text)
        self._log.append((line, start + len(text)))


def is_interrupted(path: Path) -> bool:
    """Whether a writer of that file was killed, or is at work."""
    return any(beside.is_file() for beside in _beside(Path(os.path.realpath(path))))


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".part"), path.with_name(path.name + ".part.jsonl")


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading and writing; make it if there is none."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", buffering=0)


def _write_at(file: IO[bytes], position: int, data: bytes | memoryview) -> None:
    file.seek(position)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _header_size(tensors: Mapping[str, Tensor | Span], record: Mapping[str, Any] | None) -> int:
    """At least what a record takes in the header; tensors that moved take nothing more."""
    if record is None:
        return 0
    entries = sum(len(json.dumps(key)) + 128 + 16 * len(tensor.shape) for key, tensor in tensors.items())
    return entries + len(json.dumps(json.dumps(record))) + 64
