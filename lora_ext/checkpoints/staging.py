"""Writes a directory that appears whole or not at all. After a kill, the next run continues it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_ext._common.printable import listed
from lora_ext.checkpoints.exchange import exchange
from lora_ext.files.staged_files import fsync_directory
from lora_ext.files.untrusted_json import read_json_object

_LARGEST_JOURNAL = 100_000_000  # bytes
_FREE_SPACE = "free some space and run the same command again"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: "choose a directory on another disk",
    errno.EACCES: "choose another directory, or change its rights",
    errno.EPERM: "choose another directory, or change its rights and owner",
    errno.ENAMETOOLONG: "choose a shorter name: a suffix is added to it while it is written",
    errno.ENOTDIR: "choose another directory, or remove what is there",
}


class Staging:
    """Makes the directory ``out``. Files are written to the hidden ``.<out>.unfinished`` next to it, which takes its
    place at the end.

    A journal next to it names the complete files and ``what`` is being made. The next run with an equal ``what`` keeps
    these files; any other run removes them and starts again. After an OSError or Ctrl-C the complete files stay for
    this. After other errors, which the next run would meet again, nothing stays.

    ``overwrite`` replaces what such a run wrote, and nothing else: files in ``out`` are refused by name if ``is_ours``
    is false for their paths within it, before the work and again at its end.

    Attributes:
        path: the hidden directory.
        finished: complete files in it -> their sizes.
    """

    def __init__(
        self,
        out: Path,
        what: Mapping[str, Any],
        overwrite: bool = False,
        is_ours: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.out, self.overwrite, self._is_ours = out, overwrite, is_ours
        self.what = json.loads(json.dumps(what))
        self.path = out.parent / f".{out.name}.unfinished"
        self._journal = out.parent / f".{out.name}.unfinished.json"
        self._old = out.parent / f".{out.name}.replaced"
        self.finished: dict[str, int] = {}
        self._parents: list[Path] = []  # parents of out that this run makes
        self._is_new = False  # whether this run made the hidden directory
        self._lock: int | None = None  # descriptor of the hidden directory

    def __enter__(self) -> Staging:
        try:
            self._take()
        except BaseException as error:
            if self._is_new:
                self._clean()
            self._unlock()
            if isinstance(error, OSError):
                raise self._explained(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.finished = {}
        if error is not None:
            self._clean()
        self._unlock()
        if isinstance(error, OSError):
            raise self._explained(error) from error

    def _take(self) -> None:
        """Makes the hidden directory, or takes over that of an interrupted run."""
        self._lock = self._open()
        if self._lock is None or self._read_journal() is None:
            self._discard()  # nothing to continue: another run replaced this directory and could not remove it
        elif self._old.exists():
            self._put_back()
        self._check()
        self._parents = [parent for parent in self.out.parents if not parent.exists()]
        while self._lock is None:
            self._is_new = True
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._open()
        with suppress(FileNotFoundError):
            os.lstat(self._journal)  # its name may be too long
        journal = self._read_journal()
        if journal is not None and journal["what"] == self.what:
            self.finished = {
                name: size
                for name, size in journal["files"].items()
                if (self.path / name).is_file() and (self.path / name).stat().st_size == size
            }
        elif os.path.lexists(self._journal):
            self._journal.unlink()  # before the files that it names: this run may write them again
        self._remove_unfinished()

    def finish(self, *names: str) -> None:
        """Writes complete files through to the disk, and then enters them into the journal, all at once."""
        for name in names:
            with open(self.path / name, "rb") as file:
                os.fsync(file.fileno())
        for directory in {(self.path / name).parent for name in names} | {self.path}:
            fsync_directory(directory)  # before the journal names the files
        finished = self.finished | {name: (self.path / name).stat().st_size for name in names}
        with open(self._new_journal, "w", encoding="utf-8") as file:
            json.dump({"what": self.what, "directory": _identity(self.path), "files": finished}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._new_journal, self._journal)
        fsync_directory(self.out.parent)
        self.finished = finished

    def publish(self) -> None:
        """Moves the directory to ``out``, and removes the old ``out``.

        If the file system can exchange two directories (Linux), ``out`` is the old or the new one at any time.
        Otherwise it is missing between two renames. If the process is killed there, the next run puts the old one back
        before it continues.
        """
        for file in self.path.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            else:
                fsync_directory(file)
        fsync_directory(self.path)
        old = None
        try:
            if self.out.exists():
                old = _lock(self.out)  # otherwise another run could mistake it for the directory of a killed run
                self._check_ours()
            if old is None or not exchange(self.path, self.out):
                self._rename()
            self.finished = {}  # nothing is left to continue, even if one of the next steps fails
            fsync_directory(self.out.parent)
            self._discard_old()
        finally:
            if old is not None:
                os.close(old)

    def _discard_old(self) -> None:
        try:
            self._discard()
        except OSError as error:
            leftover = next((path for path in (self.path, self._old) if path.exists()), self._journal)
            raise RuntimeError(
                f"{self.out} is complete, but {leftover} is left and has to be removed: {error}"
            ) from error

    def _rename(self) -> None:
        if not self.out.exists():
            os.rename(self.path, self.out)
            return
        os.rename(self.out, self._old)
        try:
            os.rename(self.path, self.out)
        except OSError:
            os.rename(self._old, self.out)
            raise

    def _check(self) -> None:
        """Raises FileExistsError if ``out`` must not be replaced."""
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise FileExistsError(f"{self.out} exists and is not a directory; name another output")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not self.overwrite:
            raise FileExistsError(f"{self.out} exists; choose another directory, or overwrite it (--overwrite)")
        if not any(self.out.glob("*.safetensors")):
            raise FileExistsError(f"{self.out} holds no safetensors file: it is not overwritten; remove it yourself")
        self._check_ours()

    def _check_ours(self) -> None:
        """Raises FileExistsError if ``out`` has files that this kind of run does not write."""
        paths = sorted(path for path in self.out.rglob("*") if path.is_symlink() or not path.is_dir())
        names = [path.relative_to(self.out).as_posix() for path in paths]
        others = [name for name in names if not self._is_ours(name)]
        if others:
            raise FileExistsError(
                f"{self.out} holds files that overwriting it would remove; move them, or choose another directory:"
                f"{listed(others)}"
            )

    def _open(self) -> int | None:
        """Opens and locks the hidden directory. Returns None if there is none."""
        while True:
            try:
                fd = _lock(self.path)
            except FileNotFoundError:
                return None
            except BlockingIOError as error:
                raise RuntimeError(f"another process is writing {self.out}; wait for its end, or end it") from error
            if os.fstat(fd).st_uid != os.geteuid():
                os.close(fd)
                raise PermissionError(errno.EPERM, "it belongs to another user", str(self.path))
            if self.path.exists() and os.path.samestat(os.fstat(fd), self.path.stat()):
                return fd
            os.close(fd)  # another process has removed it

    @property
    def _new_journal(self) -> Path:
        return self._journal.with_suffix(".new")

    def _read_journal(self) -> dict[str, Any] | None:
        """Reads the journal. Returns None if it is about another directory, such as one that has become ``out``."""
        try:
            journal = read_json_object(self._journal, "", _LARGEST_JOURNAL)
            about_it = journal["directory"] == _identity(self.path) and isinstance(journal["files"], dict)
            return journal if about_it and "what" in journal else None
        except (OSError, ValueError, KeyError):
            return None

    def _clean(self) -> None:
        """Removes files that the next run cannot continue. If this fails, the next run removes them."""
        with suppress(OSError):
            if self._lock is not None:
                self._remove_unfinished() if self.finished else self._discard()
        with suppress(OSError):
            for parent in self._parents:
                parent.rmdir()

    def _remove_unfinished(self) -> None:
        for entry in sorted(self.path.rglob("*"), reverse=True):  # a directory after its content
            if entry.is_dir() and not entry.is_symlink():
                if not any(entry.iterdir()):
                    entry.rmdir()
            elif str(entry.relative_to(self.path)) not in self.finished:
                entry.unlink()

    def _discard(self) -> None:
        """Removes everything next to ``out``, the journal first: without it, no run uses the rest."""
        self._put_back()
        for path in (self._journal, self._new_journal):
            if os.path.lexists(path):
                path.unlink()
        if self._lock is not None and self.path.exists():  # without the lock, another run may use it
            shutil.rmtree(self.path)
        self._unlock()

    def _put_back(self) -> None:
        """Completes or reverts the two renames of a killed process."""
        if self._old.exists() and not self.out.exists():
            os.rename(self._old, self.out)
        elif self._old.exists():
            shutil.rmtree(self._old)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _explained(self, error: OSError) -> OSError:
        """Adds path and remedy to an error about a file that is written here. Returns other errors unchanged."""
        if error.errno is None:
            return error
        path = Path(error.filename2 or error.filename or self.path)
        ours = {self.out, self.path, self._journal, self._new_journal, self._old}
        if not ours & {path, *path.parents} and path not in self.out.parents:
            return error
        reason = f"{error.strerror}; {_REMEDIES.get(error.errno, 'choose a directory on another disk')}"
        kept = f" ({len(self.finished)} complete files are kept for that)" if self.finished else ""
        return OSError(error.errno, f"{self.out} cannot be written: {reason}{kept}", str(path))


def _lock(directory: Path) -> int:
    """Opens and locks a directory. Raises BlockingIOError if another process has locked it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _identity(directory: Path) -> list[int]:
    status = directory.stat()
    return [status.st_dev, status.st_ino]
