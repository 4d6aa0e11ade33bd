"""Places on a disk: checked before the work that is for them, and written whole or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

__all__ = ["check_place", "free_name", "lock", "sync_folder", "write_whole"]


def check_place(path: Path) -> None:
    """Check that a file can be written at a path, before the work that it is for. Missing folders are made.

    Args:
        path: The file. It is not touched.

    Raises:
        OSError: If it cannot; the class tells the kind, as for `open`.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder: give the path of a file in it")
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, f"{path} is a device or a pipe: give the path of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            errno.ENOTDIR, f"no file can be at {path}: a folder of that path is a file; give another path"
        ) from error
    except OSError as error:
        raise OSError(
            error.errno, f"cannot make the folder {path.parent}: {error.strerror}; give another path"
        ) from error
    try:
        if path.exists():
            path.open("r+b").close()
    except PermissionError as error:
        raise PermissionError(error.errno, f"{path} is write-protected: give another path, or remove it") from error
    # as long as the longest name that is put beside a file
    probe = path.with_name(path.name + ".measured.probe")
    try:
        with probe.open("wb", buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(error.errno, f"cannot write in {path.parent}: {error.strerror}; give another path") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def free_name(path: Path, word: str) -> Path:
    """Return a name beside a file that no file has: `a.yaml` and "old" make `a.old.yaml`, then `a.old2.yaml`."""
    number = 1
    while (beside := path.with_name(f"{path.stem}.{word}{number if number > 1 else ''}{path.suffix}")).exists():
        number += 1
    return beside


def lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes from a file while it is open here; a lock of a killed process does not count.

    Args:
        file: The open file.
        path: What is being written, for the message.

    Raises:
        BlockingIOError: If another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f"another process, or another call in this one, is writing {path}: give another path"
        ) from error
    except OSError:  # a file system without locks
        return


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears, or is replaced, only when it is whole and on the disk."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
