"""A file that one process or thread holds at a time, on one or several machines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of file systems that lack a feature, unlike those of a full disk or a missing permission.
NOT_SUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF}


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of the file ``path`` and removes the file; yields False if another holder has removed it.

    Raises:
        BlockingIOError: without ``wait``, another holds it.
        FileNotFoundError: its directory is gone.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
        is_held = _is_at(fd, path)
        try:
            yield is_held
        finally:
            if is_held:
                with contextlib.suppress(OSError):
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile holds it too
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
