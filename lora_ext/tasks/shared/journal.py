"""A journal of results, one JSON line each; an interrupted run resumes from it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_ext.tasks import TaskError
from lora_ext.tasks.shared.whole_files import writing


class Journal:
    """A file of JSON objects, one a line, that grows at its end. A line cut off by a kill counts as not written.

    Attributes:
        entries: the entries of the file and those added since, as parsed from JSON.
    """

    def __init__(self, path: Path) -> None:
        """Opens ``path``; creates it if it is missing.

        Raises:
            TaskError: another process is writing to it.
            WriteError: the disk refuses it.
        """
        self.path = path
        self.entries: list[dict[str, Any]] = []
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise TaskError(f"another process is writing {path}; wait for its end, or end it") from error
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                entry = None
            if not isinstance(entry, dict):
                break  # drops the following lines, too: they can be later than the lost one
            self.entries.append(entry)
            whole += len(line)
        with writing(path):
            os.ftruncate(self._fd, whole)

    def add(self, entry: dict[str, Any]) -> None:
        """Writes ``entry`` to the disk before it returns. WriteError: the disk refuses; it counts as not written."""
        line = json.dumps(entry, allow_nan=False)
        data = memoryview(f"{line}\n".encode())
        with writing(self.path):
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        self.entries.append(json.loads(line))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
