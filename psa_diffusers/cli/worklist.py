"""A list of work that several processes share: each piece is done once, whoever dies meanwhile.

The processes need nothing in common but a folder. Who takes a piece creates a claim, a file that only one process can
create, and touches it while it works. The claim of a process that is gone is stale: another one may take the piece over
by creating the next claim, ``name.claim2`` after ``name.claim1``. No claim is removed before its piece is finished, so
none is ever taken away from under a process that has work to do.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import stat
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from psa_diffusers.presets.values import is_int

__all__ = ["share_out"]

logger = logging.getLogger("psa_diffusers")

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0

_LONGEST = 4096  # bytes of a claim
_UNKNOWN = uuid.uuid4().hex


def share_out(
    names: Sequence[str], folder: Path, is_finished: Callable[[str], bool], *, stale_seconds: float = STALE_SECONDS
) -> Generator[int, None, None]:
    """Yield the numbers of the pieces that this process is to do, one by one, until all are finished.

    The piece that was yielded last must be finished when the next is asked for. Pieces that other processes have
    claimed are waited for, after a line that says for whom, and done here if those processes die or fail.

    Args:
        names: Names of the pieces, fit for file names.
        folder: Where the claims stand; the same for all processes.
        is_finished: Whether a piece is done. Must tell from something that all processes see and that appears in one
            move, such as a file that is renamed to its name.
        stale_seconds: Without a sign of life for so long, a process on another machine counts as dead.
    """
    waiting = list(range(len(names)))
    told: set[str] = set()
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
            holders = {_holder(folder, names[index]) for index in of_others}
            if not holders <= told:
                print(f"waiting for {', '.join(sorted(holders))}", flush=True)
                told |= holders
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
                _remove(path)
        else:
            # not removed: who looks meanwhile could make the same claim twice. Written over what stands there, which
            # takes no room on a full disk; should it fail all the same, the claim gets old
            with suppress(OSError):
                descriptor = os.open(self._path, os.O_WRONLY)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(json.dumps({"given_up": True}).encode().ljust(os.fstat(descriptor).st_size))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that does not answer now may do so at the next beat
                os.utime(self._path)


def _sweep(folder: Path, names: Sequence[str]) -> None:
    """Remove what processes that died have left of their claims, once all pieces are finished."""
    ours = set(names)
    for path in list(folder.glob("*.claim*")):
        if path.stem in ours:
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # gone already, or a folder that somebody gave the name of a claim
        path.unlink()


def _take(folder: Path, name: str, stale_seconds: float) -> _Claim | None:
    """Claim a piece, None if a process that lives has it."""
    number = 1
    while True:
        path = _path(folder, name, number)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            # only the latest claim counts
            if not os.path.lexists(_path(folder, name, number + 1)) and not _is_stale(path, stale_seconds):
                return None
            number += 1
            continue
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"machine": _machine(), "process": os.getpid()}, file)
        except OSError as error:
            _remove(path)  # empty: nobody takes it over while it is young
            raise OSError(
                f"cannot claim {name}: {error.strerror}, writing {path}. Make room and start again"
            ) from error
        return _Claim(folder, name, number)


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.claim{number}"


@dataclass(frozen=True)
class _Owner:
    """Who made a claim: `process` of `machine`. A process that failed has given up."""

    machine: str = ""
    process: int = 0
    given_up: bool = False


def _read(path: Path) -> _Owner | None:
    """Return who made a claim, None if that cannot be known now: it is being made, or another user's.

    Raises:
        FileNotFoundError: If it is gone.
        ValueError: If it is not what `_take` writes.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is no file")
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    if not content:
        return None
    try:
        owner = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(owner, dict):
        raise ValueError("it is no JSON object")
    if owner.get("given_up") is True:
        return _Owner(given_up=True)
    machine, process = owner.get("machine"), owner.get("process")
    if not isinstance(machine, str) or not is_int(process) or not 0 < process < 1 << 31:
        raise ValueError("it names no machine and process")
    return _Owner(machine, process)


def _is_stale(path: Path, stale_seconds: float) -> bool:
    """Whether the process that made a claim is gone, or nobody knows of one."""
    try:
        touched = path.lstat().st_mtime
        owner = _read(path)
    except FileNotFoundError:
        return False  # given up this moment: look again later
    except ValueError as error:
        logger.warning("%s is not what this program writes: %s. It counts as stale", path, error)
        return True
    if owner is not None:
        if owner.given_up:
            return True
        if owner.machine == _machine() and os.name == "posix" and not _lives(owner.process):
            return True
    os.utime(path.parent)  # reads the clock of the disk, which need not be ours
    silent = path.parent.stat().st_mtime - touched
    if silent < -stale_seconds:
        # who lives touches it by the clock of the disk
        logger.warning("%s is dated %.0f seconds in the future. It counts as stale", path, -silent)
    return abs(silent) > stale_seconds


def _lives(process: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


def _holder(folder: Path, name: str) -> str:
    """Name whoever has the latest claim on a piece, for a message."""
    number = 1
    while os.path.lexists(_path(folder, name, number + 1)):
        number += 1
    path = _path(folder, name, number)
    try:
        owner = _read(path)
    except (OSError, ValueError):
        owner = None
    if owner is None or owner.given_up:
        return f"whoever made {path}"
    return f"process {owner.process} on {owner.machine.split(' ')[0]}"


def _machine() -> str:
    """Name the set of processes that this one can see, and no other.

    That is a boot of a kernel and a namespace of process numbers. Host names are no use: containers of one image, and
    hosts of one image, share them. Where the two cannot be read, no other process is known to be on this machine.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except (OSError, ValueError):
        return f"{platform.node()} {_UNKNOWN}"
