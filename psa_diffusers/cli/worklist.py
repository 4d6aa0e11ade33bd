"""A list of work that several processes share: each piece is done once, whoever dies meanwhile.

The processes need nothing in common but a folder. Who takes a piece creates a claim, a file that only one process can
create, and touches it while it works. The claim of a process that is gone is stale: another one may take the piece over
by creating the next claim, ``name.claim2`` after ``name.claim1``. No claim is removed before its piece is finished, so
none is ever taken away from under a process that has work to do.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

__all__ = ["share_out"]

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0


def share_out(
    names: Sequence[str], folder: Path, is_finished: Callable[[str], bool], *, stale_seconds: float = STALE_SECONDS
) -> Generator[int, None, None]:
    """Yield the numbers of the pieces that this process is to do, one by one, until all are finished.

    The piece that was yielded last must be finished when the next is asked for. Pieces that other processes have
    claimed are waited for, and done here if those processes die or fail.

    Args:
        names: Names of the pieces, fit for file names.
        folder: Where the claims stand; the same for all processes.
        is_finished: Whether a piece is done. Must tell from something that all processes see and that appears in one
            move, such as a file that is renamed to its name.
        stale_seconds: Without a sign of life for so long, a process on another machine counts as dead.
    """
    waiting = list(range(len(names)))
    while waiting:
        of_others = []
        for index in waiting:
            if is_finished(names[index]):
                continue
            claim = _take(folder, names[index], stale_seconds)
            if claim is None:
                of_others.append(index)
                continue
            with claim:
                # somebody may have finished it, and dropped the claim, between the two looks
                if not is_finished(names[index]):
                    yield index
        if of_others and len(of_others) == len(waiting):
            time.sleep(POLL_SECONDS)
        waiting = of_others
    _sweep(folder, names)


class _Claim:
    """A piece that is ours: shows signs of life until the end of the `with` block."""

    def __init__(self, folder: Path, name: str, number: int) -> None:
        self._path = _path(folder, name, number)
        self._taken_over = [_path(folder, name, earlier) for earlier in range(1, number)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Claim:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            # each by its number: another process may have removed some of them already
            for path in (*self._taken_over, self._path):
                path.unlink(missing_ok=True)
        else:
            # not removed: who looks meanwhile could make the same claim twice
            self._path.write_text(json.dumps({"given_up": True}), encoding="utf-8")

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._path.touch()


def _sweep(folder: Path, names: Sequence[str]) -> None:
    """Remove what processes that died have left of their claims, once all pieces are finished."""
    ours = set(names)
    for path in list(folder.glob("*.claim*")):
        if path.stem in ours:
            path.unlink(missing_ok=True)


def _take(folder: Path, name: str, stale_seconds: float) -> _Claim | None:
    """Claim a piece, None if a process that lives has it."""
    number = 1
    while True:
        try:
            descriptor = os.open(_path(folder, name, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            # only the latest claim counts
            if not _path(folder, name, number + 1).exists() and not _is_stale(
                _path(folder, name, number), stale_seconds
            ):
                return None
            number += 1
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"machine": _machine(), "process": os.getpid()}, file)
        return _Claim(folder, name, number)


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.claim{number}"


def _is_stale(path: Path, stale_seconds: float) -> bool:
    """Whether the process that made a claim is gone."""
    try:
        text, touched = path.read_text(encoding="utf-8"), path.stat().st_mtime
    except FileNotFoundError:
        return False  # given up this moment: look again later
    try:
        owner = json.loads(text)
    except ValueError:
        owner = {}  # created this moment, or its process died in this moment
    if owner.get("given_up"):
        return True
    if owner.get("machine") == _machine() and os.name == "posix":
        try:
            os.kill(owner["process"], 0)  # sends nothing
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # lives, under another user
    os.utime(path.parent)  # reads the clock of the disk, which need not be ours
    return path.parent.stat().st_mtime - touched > stale_seconds


def _machine() -> str:
    """Name the set of processes that this one can see: containers on one machine are several."""
    try:
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()
