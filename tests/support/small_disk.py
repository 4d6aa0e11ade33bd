"""Disks that are full: a limit on the size of files, a file system of a few pages, and folders of somebody else."""

import os
import resource
import signal
import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def largest_file(size):
    """No file of this process may become larger: writing fails with "File too large"."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def small_disk(folder, kib):
    """A folder with a file system of so many KiB; needs the right to mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def somebody_else():
    """Without the rights of the superuser, who may write everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
