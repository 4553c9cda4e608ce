"""A directory that appears whole or not at all, and whose making can be continued after the process was killed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Staging", "fingerprint", "fsync_directory"]


class Staging:
    """Makes the directory ``out`` in a hidden one beside it, ``.<out>.unfinished``, that is renamed at the end.

    A journal beside it names the files that are complete, and ``what`` is being made: the next run with the same
    ``what`` keeps them, any other begins anew. An error that a further try would meet again removes all of it.

    Attributes:
        path: the hidden directory.
        finished: names of the files in it that are complete.
    """

    def __init__(self, out: Path, what: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out, self.overwrite = out, overwrite
        self.what = json.loads(json.dumps(what))
        self.path = out.parent / f".{out.name}.unfinished"
        self._journal = out.parent / f".{out.name}.unfinished.json"
        self._old = out.parent / f".{out.name}.replaced"
        self.finished: dict[str, int] = {}

    def check(self) -> None:
        """Raises FileExistsError or OSError where ``out`` could not be made in the end."""
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise FileExistsError(f"{self.out} exists and is no directory")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not self.overwrite:
            raise FileExistsError(f"{self.out} exists; choose another directory, or overwrite it (--overwrite)")
        if not any(self.out.glob("*.safetensors")):
            raise FileExistsError(f"{self.out} holds no safetensors file: it is not overwritten; remove it yourself")

    def __enter__(self) -> Staging:
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise OSError(error.errno, f"cannot write there ({error.strerror})", str(self.path)) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise RuntimeError(f"another process is writing {self.out}") from error
        self.finished = self._read_journal()
        for file in [entry for entry in self.path.rglob("*") if not entry.is_dir()]:
            if str(file.relative_to(self.path)) not in self.finished:
                file.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception) and not isinstance(error, OSError):
            shutil.rmtree(self.path, ignore_errors=True)
            self._journal.unlink(missing_ok=True)
        os.close(self._lock)

    def _read_journal(self) -> dict[str, int]:
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            if journal["what"] != self.what:
                return {}
            files = dict(journal["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {
            name: size
            for name, size in files.items()
            if (self.path / name).is_file() and (self.path / name).stat().st_size == size
        }

    def finish(self, *names: str) -> None:
        """Makes complete files last, and enters them into the journal: together, or none of them."""
        for name in names:
            with open(self.path / name, "rb") as file:
                os.fsync(file.fileno())
            self.finished[name] = (self.path / name).stat().st_size
        for directory in {(self.path / name).parent for name in names} | {self.path}:
            fsync_directory(directory)  # before the journal says so
        temporary = self._journal.with_suffix(".new")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"what": self.what, "files": self.finished}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._journal)
        fsync_directory(self.out.parent)

    def publish(self) -> None:
        """Puts the directory in its place. Of an old one there, either it or the new one is found at any time but one.

        Between two renames there is none at ``out``; a process killed there leaves both beside it, and the next run
        completes the exchange.
        """
        for file in self.path.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            else:
                fsync_directory(file)
        fsync_directory(self.path)
        replaces = self.out.exists() and any(self.out.iterdir())
        if replaces:
            _remove(self._old)
            os.rename(self.out, self._old)
        try:
            os.rename(self.path, self.out)
        except OSError:
            if replaces:
                os.rename(self._old, self.out)
            raise
        fsync_directory(self.out.parent)
        self._journal.unlink(missing_ok=True)
        _remove(self._old)


def fingerprint(files: Iterable[Path], contents: bool) -> list[list[Any]]:
    """What changes when one of ``files`` does: its size and time, or its ``contents``."""
    return [[str(file), *(_digest(file) if contents else _state(file))] for file in files]


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _digest(file: Path) -> tuple[str]:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return (digest.hexdigest(),)


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
