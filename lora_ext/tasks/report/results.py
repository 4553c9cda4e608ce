"""The results that other commands wrote into a directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ext.files import read_json_object
from lora_ext.tasks import TaskError

_FILES = {  # file name: the command that writes it, and keys that it always has
    "compare.json": ("compare", ("methods", "seeds", "base_forward_ms", "examples", "machine", "date", "command")),
    "sweep.json": ("sweep", ("ranks", "targets", "cells", "within_budget", "examples", "machine", "date", "command")),
    "analysis.json": ("analyze", ("adapters", "layers", "summary", "base", "notes", "machine", "date", "command")),
    "plan.json": ("plan", ("method", "runs")),
    "metrics.json": ("finetune", ("settings", "after", "examples", "machine", "date", "command")),
}

_LARGEST = 200_000_000  # bytes


@dataclass(frozen=True)
class Result:
    """The file that a command wrote: its path and its content."""

    command: str
    path: Path
    content: dict[str, Any]

    @property
    def directory(self) -> Path:
        return self.path.parent


def find_results(directory: Path) -> list[Result]:
    """Returns the results in ``directory`` and below, in the order of the page: by command, then by path.

    The runs of a finished comparison or sweep belong to it and are not in the list.

    Raises:
        TaskError: there is no result, or a file is not what its command writes; the message names it.
    """
    if not directory.is_dir():
        raise TaskError(f"{directory} is not a directory")
    results, parts = [], set()
    for folder, folders, files in os.walk(directory, onerror=_unreadable):
        folders.sort()
        found = [name for name in _FILES if name in files]
        results += [_read(Path(folder, name)) for name in found]
        if "compare.json" in found or "sweep.json" in found:
            parts.add(Path(folder, "runs"))
    results = [one for one in results if one.command != "finetune" or not parts & {*one.directory.parents}]
    if not results:
        raise TaskError(
            f"{directory} holds no result of lora-ext: finetune writes metrics.json into its --out, compare "
            "compare.json, sweep sweep.json, analyze analysis.json and plan plan.json; name that directory, or "
            "one above it"
        )
    order = [command for command, _ in _FILES.values()]
    return sorted(results, key=lambda result: (order.index(result.command), result.path))


def _unreadable(error: OSError) -> None:
    raise TaskError(f"{error.filename} cannot be read: {error.strerror}") from error


def _read(path: Path) -> Result:
    command, keys = _FILES[path.name]
    try:
        content = read_json_object(path, "", _LARGEST)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TaskError(f"{error}; run lora-ext {command} again, or move the file away") from error
    if missing := [key for key in keys if key not in content]:
        raise TaskError(
            f"{path} is not what lora-ext {command} writes: it lacks {', '.join(missing)}; move the file away"
        )
    return Result(command, path, content)
