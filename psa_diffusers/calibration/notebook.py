"""What a calibration has measured, line by line, in a file that a later call goes on with.

A file that does not fit, in whatever line, is named and set aside: nothing of it is used. Only a last line that was cut
off is no fault; its call is measured again.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from psa_diffusers.calibration.ladder import DENSITIES
from psa_diffusers.calibration.places import check_place, free_name, lock
from psa_diffusers.presets.values import is_int, is_list, is_real

__all__ = ["Notebook"]

logger = logging.getLogger("psa_diffusers")

_PLACE = ("prompt", "denoiser", "step", "layer", "forward")
_KEYS = {*_PLACE, "num_steps", "rungs"}

IsSampled = Callable[[int, int], bool]
"""Step and number of steps to whether that step is measured."""


class Notebook:
    """The measurements, and the file that holds them. Use it in a `with` statement: nobody else writes meanwhile.

    Args:
        path: The file; it appears, or is gone on with.
        key: What the measurements depend on. A file of another key does not fit.
        num_prompts: Number of prompts.
        is_sampled: Which steps are measured.

    Attributes:
        entries: One dict a measured call.
        finished: Numbers of the prompts that are measured.

    Raises:
        OSError: If the file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, key: str, num_prompts: int, is_sampled: IsSampled) -> None:
        check_place(path)
        self.entries: list[dict[str, Any]] = []
        self.finished: set[int] = set()
        self._num_prompts, self._is_sampled = num_prompts, is_sampled
        self._known: set[tuple[Any, ...]] = set()
        self._file = path.open("a+b", buffering=0)
        try:
            lock(self._file, path)
            self._file.seek(0)
            *lines, torn = self._file.read().split(b"\n")
            try:
                for number, line in enumerate(lines):
                    self._take(line, number, key)
            except ValueError as error:
                self._file.close()
                aside = free_name(path, "old")
                path.replace(aside)
                logger.warning(
                    "%s does not fit, line %d: %s. It is now %s, and everything is measured anew",
                    path, number + 1, error, aside.name,
                )  # fmt: skip
                self.entries, self.finished, self._known, lines, torn = [], set(), set(), [], b""
                self._file = path.open("a+b", buffering=0)
                lock(self._file, path)
            if torn:
                self._file.truncate(sum(len(line) + 1 for line in lines))
            if not lines:
                self._write({"key": key})
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Notebook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def has(self, entry: dict[str, Any]) -> bool:
        """Whether the call of an entry is measured."""
        return _place(entry) in self._known

    def add(self, entry: dict[str, Any]) -> None:
        """Note the measurements of a call."""
        self._write(entry)
        self.entries.append(entry)
        self._known.add(_place(entry))

    def finish(self, prompt: int) -> None:
        """Note that a prompt is measured."""
        self._write({"finished": prompt, "calls": self._calls()[prompt]})
        os.fsync(self._file.fileno())
        self.finished.add(prompt)

    def _write(self, values: dict[str, Any]) -> None:
        left = json.dumps(values, allow_nan=False).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            # half a line would be taken for the beginning of the next one
            self._file.truncate(start)
            raise

    def _calls(self) -> Counter[int]:
        return Counter(entry["prompt"] for entry in self.entries)

    def _take(self, line: bytes, number: int, key: str) -> None:
        """Take over a line of an earlier call, or raise a ValueError that says why it does not fit."""
        try:
            values = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {type(values).__name__}")
        if number == 0:
            if values.keys() != {"key"}:
                raise ValueError("expected the key of a calibration")
            if values["key"] != key:
                raise ValueError("it was measured with other prompts, other arguments or other weights")
        elif "finished" in values:
            prompt = values["finished"]
            if not (is_int(prompt) and 0 <= prompt < self._num_prompts and prompt not in self.finished):
                raise ValueError(f"finished: expected a prompt that was not finished, got {prompt!r}")
            if values.get("calls") != self._calls()[prompt]:
                raise ValueError(f"calls of prompt {prompt} are missing")
            self.finished.add(prompt)
        else:
            self._check_entry(values)
            self.entries.append(values)
            self._known.add(_place(values))

    def _check_entry(self, entry: dict[str, Any]) -> None:
        if entry.keys() != _KEYS:
            raise ValueError(f"expected {', '.join(sorted(_KEYS))}, got {', '.join(sorted(entry))}")
        for name in ("prompt", "step", "layer", "forward", "num_steps"):
            if not (is_int(entry[name]) and entry[name] >= 0):
                raise ValueError(f"{name}: expected a number from 0, got {entry[name]!r}")
        if not isinstance(entry["denoiser"], str):
            raise ValueError(f"denoiser: expected a name, got {entry['denoiser']!r}")
        if entry["prompt"] >= self._num_prompts or entry["prompt"] in self.finished:
            raise ValueError(f"prompt: expected one that was not finished, got {entry['prompt']}")
        if self.entries and entry["num_steps"] != self.entries[0]["num_steps"]:
            raise ValueError(f"num_steps: expected {self.entries[0]['num_steps']}, got {entry['num_steps']}")
        if not self._is_sampled(entry["step"], entry["num_steps"]):
            raise ValueError(f"step: {entry['step']} of {entry['num_steps']} is none that is measured")
        if self.has(entry):
            raise ValueError("the call was measured before")
        rungs = entry["rungs"]
        if not (is_list(rungs) and len(rungs) == len(DENSITIES) and all(map(_is_measured, rungs))):
            raise ValueError(f"rungs: expected {len(DENSITIES)} pairs of error and density, got {str(rungs)[:60]}")


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in _PLACE)


def _is_measured(rung: Any) -> bool:
    return is_list(rung) and len(rung) == 2 and all(map(is_real, rung)) and rung[0] >= 0 and 0 < rung[1] <= 1


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no finite number")
