"""Writes files and directories whole or not at all, even if the process is killed or the disk is full."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lora_ext.tasks import WriteError

_FRESH, _OLD = ".unfinished", ".removed"  # endings of hidden names next to the written path


def is_leftover(path: Path) -> bool:
    """Returns whether a killed process was writing or removing ``path``."""
    return path.name.startswith(".") and path.name.endswith((_FRESH, _OLD))


def remove_leftovers(directory: Path) -> None:
    """Removes leftovers of killed processes in ``directory``. OSError: one cannot be removed."""
    for path in [path for path in directory.glob(".*") if is_leftover(path)]:
        _remove(path, ignore_errors=False)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns any error of a library that cannot write ``path`` into a WriteError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:
        if not _is_about_the_disk(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WriteError(f"{path} cannot be written: {reason}") from error


def _is_about_the_disk(error: Exception) -> bool:
    """Returns whether a library made this error from an OSError."""
    if isinstance(error, SafetensorError | RuntimeError):  # torch.save raises RuntimeError
        return True
    return type(error) is Exception and "(os error " in str(error)  # tokenizers raises these


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes the file, replacing an old one."""
    fresh = _hidden(path, _FRESH)
    with writing(path):
        try:
            fresh.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(fresh, path)
        except BaseException:
            _remove(fresh)
            raise


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_picture(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_whole(path, content.getvalue())


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory, which replaces ``path`` and all its content when the block succeeds.

    ``path`` does not exist for a moment between two renames.
    """
    fresh = _hidden(path, _FRESH)
    with writing(path):
        try:
            _remove(fresh)
            fresh.mkdir(parents=True)
            yield fresh
            old = _hide(path)
            os.rename(fresh, path)
            _remove(old)
        except BaseException:
            _remove(fresh)
            raise


def discard(path: Path) -> None:
    """Removes a file or directory, never leaving a part of it visible. OSError: it cannot be removed."""
    _remove(_hide(path), ignore_errors=False)


def _hide(path: Path) -> Path:
    """Renames ``path`` if it exists. Returns the hidden name, which any later run may remove."""
    old = _hidden(path, _OLD)
    _remove(old, ignore_errors=False)
    if os.path.lexists(path):
        os.rename(path, old)
    return old


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")


def _remove(path: Path, ignore_errors: bool = True) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if not ignore_errors:
            raise
