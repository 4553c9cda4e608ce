"""Several files of a directory replaced together: at any moment a reader finds all the old ones or all the new ones.

No call renames two files, so one rename decides for all. New files are written into ``.lora_ext-saving/new``, and links
to the old ones are put into ``.lora_ext-saving/old``. Then each name becomes a symbolic link through
``.lora_ext-saving/current``, which leads to ``old``: nothing has changed for a reader. Turning ``current`` to ``new``
changes all of them at once. At last the files themselves take the places of the links. A process that is killed leaves
links that lead to whole files, the old ones or the new ones; the next save there finishes what it finds.

A lock lets one process or thread at a time do this in a directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lora_ext._common.interrupts import uninterrupted
from lora_ext._common.printable import check_name
from lora_ext._common.warnings import warn_user
from lora_ext.files.file_bytes import tensor_bytes
from lora_ext.files.safetensors_format import DTYPE_NAMES, encode_header

__all__ = ["fsync_directory", "is_being_saved", "staged_files", "write_tensors"]

_STAGING, _LOCK, _OLD, _NEW, _CURRENT = ".lora_ext-saving", "lock", "old", "new", "current"
# What file systems answer that cannot do a thing; a full disk or a missing right is no such answer.
_NOT_SUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes CPU tensors to a safetensors file, with the rights that the user's umask gives.

    The safetensors library's own errors do not say which disk is full, and its files are for the owner alone.

    Raises:
        OSError: as ``write``.
        ValueError: a tensor has a dtype that the format lacks, or a name that cannot be printed or is too long.
    """
    for key, tensor in tensors.items():
        check_name(key, str(path))  # which readers would refuse
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{key} is {tensor.dtype}, which no safetensors file holds; convert it first")
    header, places = encode_header(
        {key: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for key, tensor in tensors.items()},
        metadata,
    )
    with open(path, "wb") as file:
        file.write(header)
        for key in places:
            values = tensors[key].contiguous()
            file.write(tensor_bytes(values))


@contextmanager
def staged_files(directory: Path, names: Sequence[str], caller: str) -> Iterator[Path]:
    """Within the context the files ``names`` are written into the directory it yields; then they replace the old ones.

    A name that was not written is removed from ``directory``; all other files stay. The directory is made if need be.
    After an error all is as it was, and directories that were made are gone; Ctrl-C waits while files are replaced. A
    process that is killed leaves the names with all of their old content, or all of the new; in a directory that had
    none of them, the last of ``names`` comes last. Another process or thread that is writing there is waited for.

    Two things depend on the file system. Where it has no symbolic links, a kill may leave the directory without the
    last of ``names``, though never an old file next to a new one. Where it has no locks, only one may save at a time.

    Raises:
        OSError: the directory cannot be written; naming it, and the reason. What was there is unchanged.
    """
    told = str(directory)
    directory = Path(os.path.abspath(directory))  # the current directory may change meanwhile
    made: list[Path] = []
    try:
        _make(directory, made)
        with _locked(directory) as staging:
            try:
                _clear(directory, names)
                (staging / _NEW).mkdir()
                yield staging / _NEW
            except BaseException:
                _clear_if_possible(directory, names)
                raise
            with uninterrupted():
                try:
                    _replace(directory, names)
                except BaseException:
                    _clear_if_possible(directory, names)
                    raise
                if (error := _clear_if_possible(directory, names)) is not None:
                    warn_user(
                        f"{caller}: all is saved, but {staging} could not be removed ({error.strerror or error}); keep "
                        "it: the next save in this directory puts its files in their places"
                    )
    except BaseException as error:
        with contextlib.suppress(OSError):
            for path in reversed(made):
                path.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            if error.filename not in (None, str(directory)):
                reason += f": {os.fspath(error.filename)}"
            raise OSError(
                error.errno or errno.EIO,
                f"{caller}: cannot write there ({reason}), and nothing in it was changed; make room or get the right "
                "to write, or choose another directory",
                told,
            ) from error
        raise


def is_being_saved(directory: Path) -> bool:
    """Whether :func:`staged_files` writes there now, or was killed in it."""
    return os.path.lexists(directory / _STAGING)


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory last, where the file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(fd)


def _make(directory: Path, made: list[Path]) -> None:
    """As ``mkdir(parents=True, exist_ok=True)``; ``made`` gets what was not there, the outermost first."""
    missing = []
    path = directory
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)
    directory.mkdir(exist_ok=True)  # an error where it is something else


@contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    """Holds the lock of a directory, and yields the staging directory, which is removed with it.

    The lock is a file in what it protects, as those on directories do not work over NFS. It goes when its last holder
    does: who gets the lock of a file that is gone by then tries again.
    """
    staging = directory / _STAGING
    while True:
        staging.mkdir(exist_ok=True)
        try:
            with _held(staging / _LOCK) as is_held:
                if is_held:
                    yield staging
                    return
        except FileNotFoundError as error:
            if error.filename != str(staging / _LOCK):
                raise
        finally:
            with contextlib.suppress(OSError):  # not empty: another has come
                staging.rmdir()


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Holds the lock of the file ``path``, and removes it; False where the last holder has done so meanwhile.

    FileNotFoundError for ``path``: its directory has gone.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
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
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile holds it too
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _replace(directory: Path, names: Sequence[str]) -> None:
    """Puts the new files in the places of the old ones. An error leaves the old ones, perhaps by way of links."""
    staging = directory / _STAGING
    new = [name for name in names if (staging / _NEW / name).exists()]
    old = [name for name in names if os.path.lexists(directory / name)]
    for name in new:
        with open(staging / _NEW / name, "rb") as file:
            os.fsync(file.fileno())
    (staging / _OLD).mkdir()
    if not old or not _links_work(staging):
        _move(directory, old, new)
        return
    for name in old:
        _keep(directory / name, staging / _OLD / name)
    for path in (staging / _OLD, staging / _NEW, staging, directory):
        fsync_directory(path)  # before anything leads there
    for name in dict.fromkeys([*old, *new]):
        _link(_link_text(name), staging, directory / name)
    fsync_directory(directory)
    _link(_NEW, staging, staging / _CURRENT)  # this decides
    with contextlib.suppress(OSError):
        fsync_directory(staging)


def _links_work(staging: Path) -> bool:
    """Makes ``current`` lead to ``old``; False where the file system has no symbolic links."""
    try:
        os.symlink(_OLD, staging / _CURRENT)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return False
    return True


def _keep(source: Path, target: Path) -> None:
    """Makes ``target`` another name of a file, or a copy where the file system has no hard links."""
    if source.is_symlink():
        os.symlink(os.path.realpath(source), target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _link_text(name: str) -> str:
    return f"{_STAGING}/{_CURRENT}/{name}"


def _link(text: str, staging: Path, place: Path) -> None:
    """Puts a symbolic link in the place of whatever is there."""
    os.symlink(text, staging / "link")
    os.replace(staging / "link", place)


def _move(directory: Path, old: Sequence[str], new: Sequence[str]) -> None:
    """Moves the old files away, the last first, and the new ones in, the last last. An error moves them back."""
    staging = directory / _STAGING
    moves = [(directory / name, staging / _OLD / name) for name in reversed(old)]
    moves += [(staging / _NEW / name, directory / name) for name in new]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _clear(directory: Path, names: Sequence[str]) -> None:
    """Finishes what a save has left, that of a dead process too, and leaves nothing of it except the lock.

    Links become the files that they lead to; a link that leads nowhere goes. Old files that were moved away (see
    :func:`_move`) come back, the last of ``names`` last, unless all new ones were moved in.
    """
    staging = directory / _STAGING
    old, new = _listed(staging / _OLD), _listed(staging / _NEW)
    if os.path.lexists(staging / _CURRENT):
        for name in {*old, *new}:
            place = directory / name
            if not place.is_symlink() or os.readlink(place) != _link_text(name):
                continue
            if os.path.lexists(staging / _CURRENT / name):
                os.replace(staging / _CURRENT / name, place)
            else:
                place.unlink()
    elif new:
        for name in sorted(old, key=lambda name: names.index(name) if name in names else -1):
            os.replace(staging / _OLD / name, directory / name)
    fsync_directory(directory)  # before what it led to goes
    for entry in (_NEW, _OLD):  # new ones left would mean that old ones were moved away
        if (staging / entry).exists():
            shutil.rmtree(staging / entry)
    for entry in _listed(staging):
        if entry != _LOCK and not entry.startswith(".nfs"):  # NFS keeps files that are open by such a name
            (staging / entry).unlink()


def _clear_if_possible(directory: Path, names: Sequence[str]) -> OSError | None:
    """As :func:`_clear`; returns its error. Nothing is lost then: the names lead to whole files."""
    try:
        with uninterrupted():
            _clear(directory, names)
    except OSError as error:
        return error
    return None


def _listed(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []
