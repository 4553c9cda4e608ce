"""Replaces several files of a directory together: a reader always finds all the old ones or all the new ones.

No system call renames two files, so a single rename must switch all. New files are written to ``.lora_ext-saving/new``;
hard links to the old ones go to ``.lora_ext-saving/old``. Each name becomes a symbolic link through
``.lora_ext-saving/current``, which first leads to ``old``, so nothing changes for a reader. Pointing ``current`` to
``new`` switches all files at once. Finally the files replace the links. A killed process leaves links to whole files,
all old or all new; the next save finishes the work.

A lock admits one process or thread at a time per directory.
"""

from __future__ import annotations

import contextlib
import errno
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
from lora_ext.files.held_file import NOT_SUPPORTED, held
from lora_ext.files.safetensors_format import DTYPE_NAMES, encode_header

_STAGING, _LOCK, _OLD, _NEW, _CURRENT = ".lora_ext-saving", "lock", "old", "new", "current"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes CPU tensors to a safetensors file, with permissions from the user's umask.

    The safetensors library does not say which disk is full, and its files are readable by the owner only.

    Raises:
        OSError: as ``write``.
        ValueError: a tensor has a dtype that the format lacks, or an unprintable or too long name.
    """
    for key, tensor in tensors.items():
        check_name(key, str(path))  # readers would refuse it
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{key} is {tensor.dtype}, which the safetensors format lacks; convert it first")
    header, places = encode_header(
        {key: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for key, tensor in tensors.items()},
        metadata,
    )
    with open(path, "wb") as file:
        file.write(header)
        for key in places:
            values = tensors[key].contiguous()  # alive until its bytes are written
            file.write(tensor_bytes(values))


@contextmanager
def staged_files(directory: Path, names: Sequence[str], caller: str) -> Iterator[Path]:
    """Yields a directory for writing the files ``names``; on exit they replace those in ``directory`` together.

    A name that was not written is removed from ``directory``; all other files stay. The directory is created if needed.
    An error restores everything and removes created directories; Ctrl-C waits while files are replaced. After a kill
    either all names have their old content or all have the new; in a directory without old files, the last of ``names``
    appears last. Waits for other processes and threads that save there.

    Two things depend on the file system. Without symbolic links, a kill may leave the directory without the last of
    ``names``, but never an old file next to a new one. Without locks, concurrent saves are not safe.

    Raises:
        OSError: the directory cannot be written; the message names it and the reason. Its content is unchanged.
    """
    given_path = str(directory)
    directory = directory.absolute()  # the current directory may change meanwhile; ".." may follow a symbolic link
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
                        "it: the next save in this directory moves its files into place"
                    )
    except BaseException as error:
        with contextlib.suppress(OSError):
            for path in reversed(made):
                path.rmdir()
        if isinstance(error, OSError):
            if isinstance(error, FileExistsError | NotADirectoryError) and (file := _not_a_directory(directory)):
                raise type(error)(
                    error.errno, f"{caller}: {file} is no directory; choose another path", given_path
                ) from error
            reason = error.strerror or str(error)
            if error.filename not in (None, str(directory)):
                reason += f": {os.fspath(error.filename)}"
            raise OSError(
                error.errno or errno.EIO,
                f"{caller}: cannot write there ({reason}), nothing in it was changed; free space, get permission to "
                "write, or choose another directory",
                given_path,
            ) from error
        raise


def is_being_saved(directory: Path) -> bool:
    """Returns whether :func:`staged_files` is saving there, or was killed while it did."""
    return os.path.lexists(directory / _STAGING)


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable, if the file system supports it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(fd)


def _make(directory: Path, made: list[Path]) -> None:
    """Makes a directory and its parents; appends those that it created to ``made``, the outermost first."""
    missing = []
    path = directory
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)
    directory.mkdir(exist_ok=True)  # raises if it is not a directory


def _not_a_directory(directory: Path) -> Path | None:
    """Returns what stands in the place of ``directory`` or of a directory above it."""
    return next((path for path in (directory, *directory.parents) if os.path.lexists(path) and not path.is_dir()), None)


@contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    """Holds the lock of a directory and yields the staging directory; removes both at the end.

    The lock is a file in the staging directory, because NFS cannot lock directories. Its last holder removes it; a
    process that then holds the lock of the removed file tries again.
    """
    staging = directory / _STAGING
    while True:
        staging.mkdir(exist_ok=True)
        try:
            with held(staging / _LOCK) as is_held:
                if is_held:
                    yield staging
                    return
        except FileNotFoundError as error:
            if error.filename != str(staging / _LOCK):
                raise
        finally:
            with contextlib.suppress(OSError):  # not empty: another process uses it
                staging.rmdir()


def _replace(directory: Path, names: Sequence[str]) -> None:
    """Replaces the old files by the new ones. An error leaves the old ones, possibly through links."""
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
        fsync_directory(path)  # before links lead there
    for name in dict.fromkeys([*old, *new]):
        _link(_link_text(name), staging, directory / name)
    fsync_directory(directory)
    _link(_NEW, staging, staging / _CURRENT)  # switches all files
    with contextlib.suppress(OSError):
        fsync_directory(staging)


def _links_work(staging: Path) -> bool:
    """Makes ``current`` lead to ``old``; False if the file system lacks symbolic links."""
    try:
        os.symlink(_OLD, staging / _CURRENT)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def _keep(source: Path, target: Path) -> None:
    """Makes ``target`` a hard link to ``source``, or a copy if the file system lacks hard links."""
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
    """Replaces ``place`` by a symbolic link."""
    os.symlink(text, staging / "link")
    os.replace(staging / "link", place)


def _move(directory: Path, old: Sequence[str], new: Sequence[str]) -> None:
    """Moves the old files out in reverse order and the new ones in. An error moves them back."""
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
    """Completes a save, also that of a dead process, and removes its files except the lock.

    Replaces links by the files that they lead to, and removes dangling ones. Moves old files back that :func:`_move`
    moved out, the last of ``names`` last, unless all new ones were moved in.
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
    fsync_directory(directory)  # before link targets are removed
    for entry in (_NEW, _OLD):  # _NEW first: new files in it would tell that old ones were moved out
        if (staging / entry).exists():
            shutil.rmtree(staging / entry)
    for entry in _listed(staging):
        if entry != _LOCK and not entry.startswith(".nfs"):  # NFS's name for removed files that are still open
            (staging / entry).unlink()


def _clear_if_possible(directory: Path, names: Sequence[str]) -> OSError | None:
    """Clears like :func:`_clear`, but returns the error. Nothing is lost then: the names refer to complete files."""
    try:
        with uninterrupted():
            _clear(directory, names)
    except OSError as error:
        return error
    return None


def _listed(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []
