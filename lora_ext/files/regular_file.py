"""Opens regular files only: reading from a foreign pipe or device may wait forever."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def open_regular(path: Path) -> FileIO:
    """Opens a regular file, or a symbolic link to one, for unbuffered reading. The file's ``name`` is the path.

    Raises:
        OSError: as ``open``.
        ValueError: it is a pipe, a socket, a device or a directory. Never waits for one.
    """
    check_regular(path, os.stat(path).st_mode)  # before opening, as opening a device may have effects
    file = open(path, "rb", buffering=0, opener=_open_without_waiting)  # noqa: SIM115  the caller closes it
    try:
        check_regular(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced meanwhile
    except ValueError:
        file.close()
        raise
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def check_regular(path: Path, mode: int) -> None:
    """Raises ValueError unless ``mode``, from ``os.stat``, is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'of unknown kind')}, want a regular file")
