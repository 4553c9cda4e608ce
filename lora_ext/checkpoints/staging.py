"""A directory that appears whole or not at all, and whose making can be continued after the process was killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_ext.checkpoints.exchange import exchange
from lora_ext.files.staged_files import fsync_directory
from lora_ext.files.untrusted_json import read_json_object

__all__ = ["Staging"]

_LARGEST_JOURNAL = 100_000_000  # bytes
_FREE_SPACE = "free some space and run the same command again"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: "choose a directory on another disk",
    errno.EACCES: "choose another directory, or change its rights",
    errno.EPERM: "choose another directory, or change its rights and owner",
    errno.ENAMETOOLONG: "choose a shorter name: something is added to it meanwhile",
    errno.ENOTDIR: "choose another directory, or remove what is there",
}


class Staging:
    """Makes the directory ``out`` in a hidden one next to it, ``.<out>.unfinished``, that takes its place at the end.

    A journal next to it names the files that are complete, and ``what`` is being made: the next run with the same
    ``what`` keeps them, any other removes them and begins from nothing. After an OSError or Ctrl-C the complete files
    stay for that; after other errors, which a further try would meet again, nothing does.

    Attributes:
        path: the hidden directory.
        finished: names of the files in it that are complete, and their sizes.
    """

    def __init__(self, out: Path, what: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out, self.overwrite = out, overwrite
        self.what = json.loads(json.dumps(what))
        self.path = out.parent / f".{out.name}.unfinished"
        self._journal = out.parent / f".{out.name}.unfinished.json"
        self._old = out.parent / f".{out.name}.replaced"
        self.finished: dict[str, int] = {}
        self._parents: list[Path] = []  # of out, that were not there
        self._is_new = False  # nothing was taken over from another run
        self._lock: int | None = None  # the hidden directory, opened

    def __enter__(self) -> Staging:
        try:
            self._take()
        except BaseException as error:
            if self._is_new:
                self._clean()
            self._unlock()
            if isinstance(error, OSError):
                raise self._told(error) from error
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
            raise self._told(error) from error

    def _take(self) -> None:
        """Makes the hidden directory, or takes what a run left that did not end."""
        self._lock = self._open()
        if self._lock is None or self._read_journal() is None:
            self._discard()  # nothing can be continued: what is there, another run replaced and could not remove
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
            self._journal.unlink()  # before the files that it names, which may be made again
        self._remove_unfinished()

    def finish(self, *names: str) -> None:
        """Makes complete files last, and enters them into the journal: together, or none of them."""
        for name in names:
            with open(self.path / name, "rb") as file:
                os.fsync(file.fileno())
        for directory in {(self.path / name).parent for name in names} | {self.path}:
            fsync_directory(directory)  # before the journal says so
        finished = self.finished | {name: (self.path / name).stat().st_size for name in names}
        with open(self._new_journal, "w", encoding="utf-8") as file:
            json.dump({"what": self.what, "directory": _identity(self.path), "files": finished}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._new_journal, self._journal)
        fsync_directory(self.out.parent)
        self.finished = finished

    def publish(self) -> None:
        """Puts the directory in the place of ``out``, and removes what was there.

        Where the file system can exchange two directories (Linux), ``out`` is either the old or the new one at any
        time. Else it is missing between two renames; after a process was killed there, the next run puts the old one
        back before it continues.
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
                old = _lock(self.out)  # so that no other run takes it for what a killed one left
            if old is None or not exchange(self.path, self.out):
                self._rename()
            self.finished = {}  # nothing is left to continue, even where one of the next steps fails
            fsync_directory(self.out.parent)
            self._discard_old()
        finally:
            if old is not None:
                os.close(old)

    def _discard_old(self) -> None:
        try:
            self._discard()
        except OSError as error:
            left = next((path for path in (self.path, self._old) if path.exists()), self._journal)
            raise RuntimeError(f"{self.out} is complete, but {left} is left and has to be removed: {error}") from error

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
        """Raises FileExistsError where ``out`` must not be made."""
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise FileExistsError(f"{self.out} exists and is no directory")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not self.overwrite:
            raise FileExistsError(f"{self.out} exists; choose another directory, or overwrite it (--overwrite)")
        if not any(self.out.glob("*.safetensors")):
            raise FileExistsError(f"{self.out} holds no safetensors file: it is not overwritten; remove it yourself")

    def _open(self) -> int | None:
        """The hidden directory, opened and locked; None where there is none."""
        while True:
            try:
                fd = _lock(self.path)
            except FileNotFoundError:
                return None
            except BlockingIOError as error:
                raise RuntimeError(f"another process is writing {self.out}") from error
            if os.fstat(fd).st_uid != os.geteuid():
                os.close(fd)
                raise PermissionError(errno.EPERM, "it belongs to another user", str(self.path))
            if self.path.exists() and os.path.samestat(os.fstat(fd), self.path.stat()):
                return fd
            os.close(fd)  # another process removed it meanwhile

    @property
    def _new_journal(self) -> Path:
        return self._journal.with_suffix(".new")

    def _read_journal(self) -> dict[str, Any] | None:
        """The journal, if it is about the hidden directory: not about one that has become ``out``."""
        try:
            journal = read_json_object(self._journal, "", _LARGEST_JOURNAL)
            about_it = journal["directory"] == _identity(self.path) and isinstance(journal["files"], dict)
            return journal if about_it and "what" in journal else None
        except (OSError, ValueError, KeyError):
            return None

    def _clean(self) -> None:
        """Removes what the next run cannot continue; what cannot be removed now, that run removes."""
        with suppress(OSError):
            if self._lock is not None:
                self._remove_unfinished() if self.finished else self._discard()
        with suppress(OSError):
            for parent in self._parents:
                parent.rmdir()

    def _remove_unfinished(self) -> None:
        for entry in sorted(self.path.rglob("*"), reverse=True):  # what is in a directory before the directory
            if entry.is_dir() and not entry.is_symlink():
                if not any(entry.iterdir()):
                    entry.rmdir()
            elif str(entry.relative_to(self.path)) not in self.finished:
                entry.unlink()

    def _discard(self) -> None:
        """Removes all that is next to ``out``, the journal first: without it, the rest is of no use to anybody."""
        self._put_back()
        for path in (self._journal, self._new_journal):
            if os.path.lexists(path):
                path.unlink()
        if self._lock is not None and self.path.exists():  # one that is not ours may be in use
            shutil.rmtree(self.path)
        self._unlock()

    def _put_back(self) -> None:
        """Ends what a process began that was killed between two renames."""
        if self._old.exists() and not self.out.exists():
            os.rename(self._old, self.out)
        elif self._old.exists():
            shutil.rmtree(self._old)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _told(self, error: OSError) -> OSError:
        """An error about what is written here with its path and remedy; others as they are."""
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
    """A directory, opened and locked. BlockingIOError: another process has it."""
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
