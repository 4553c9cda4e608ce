"""Opening files that somebody else made: only regular ones, as a pipe or a device may make its reader wait forever."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

__all__ = ["check_regular", "open_regular"]

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def open_regular(path: Path) -> FileIO:
    """Opens a regular file for reading, unbuffered. A symbolic link to one is one.

    Raises:
        OSError: as ``open``; with the path in ``filename``.
        ValueError: it is a pipe, a socket, a device or a directory. Nothing was waited for.
    """
    check_regular(path, os.stat(path).st_mode)  # before it is opened: opening a device may have effects
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(fd, "rb", buffering=0)
    try:
        check_regular(path, os.fstat(fd).st_mode)  # it may have been replaced meanwhile
    except ValueError:
        file.close()
        raise
    return file


def check_regular(path: Path, mode: int) -> None:
    """ValueError where ``mode``, of ``os.stat``, is not that of a regular file."""
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, want a regular file")
