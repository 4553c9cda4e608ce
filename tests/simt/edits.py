"""Compiles the kernels after textual edits, for planted bugs."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from .build import CACHE, ROOT, locked
from .driver import Library, kernel_library


@dataclass(frozen=True)
class Edit:
    path: str  # relative to the repository's root
    old: str  # occurs exactly once
    new: str


def replace_once(text: str, old: str, new: str, where: str) -> str:
    if (count := text.count(old)) != 1:
        raise ValueError(f"{where}: the text to replace occurs {count} times, want once: {old!r}")
    return text.replace(old, new)


@functools.cache
def edited_kernels(
    name: str, edits: tuple[Edit, ...], sources: tuple[str, ...] = ("*",), others: tuple[Path, ...] = ()
) -> Library:
    """Builds the edited kernels. Only the files csrc/cuda/**/<sources>.cu are compiled again; others: more sources."""
    folder = CACHE / "edited" / name
    with locked(f"{name}-edited"):  # another process would remove the sources during the build
        for part in ("csrc/common", "csrc/cuda"):
            shutil.rmtree(folder / part, ignore_errors=True)
            shutil.copytree(ROOT / part, folder / part)
        for edit in edits:
            path = folder / edit.path
            path.write_text(replace_once(path.read_text(), edit.old, edit.new, f"{name}: {edit.path}"))
        edited = [path for source in sources for path in (folder / "csrc/cuda").rglob(f"{source}.cu")]
        assert edited, f"{name}: csrc/cuda has no {sources}"
        return kernel_library(name, {path.name: path for path in edited}, others)
