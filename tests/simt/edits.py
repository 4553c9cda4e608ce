"""Textual edits of source files: the kernels with a bug planted, or with another plan."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from .build import CACHE, ROOT, locked
from .driver import Library, kernel_library


@dataclass(frozen=True)
class Edit:
    path: str  # below the repository's root
    old: str  # there exactly once
    new: str


def replace_once(text: str, old: str, new: str, where: str) -> str:
    if (count := text.count(old)) != 1:
        raise ValueError(f"{where}: the text to replace is there {count} times, want once: {old!r}")
    return text.replace(old, new)


@functools.cache
def edited_kernels(
    name: str, edits: tuple[Edit, ...], sources: tuple[str, ...] = ("*",), others: tuple[Path, ...] = ()
) -> Library:
    """The kernels with edits, of which the files csrc/cuda/**/<sources>.cu are compiled anew, and other sources."""
    folder = CACHE / "edited" / name
    with locked(f"{name}-edited"):  # until it is built: another process would take the sources away
        for part in ("csrc/common", "csrc/cuda"):
            shutil.rmtree(folder / part, ignore_errors=True)
            shutil.copytree(ROOT / part, folder / part)
        for edit in edits:
            path = folder / edit.path
            path.write_text(replace_once(path.read_text(), edit.old, edit.new, f"{name}: {edit.path}"))
        anew = [path for source in sources for path in (folder / "csrc/cuda").rglob(f"{source}.cu")]
        assert anew, f"{name}: csrc/cuda has no {sources}"
        return kernel_library(name, {path.name: path for path in anew}, others)


# The plans split work over the blocks of a large GPU. At a test's sizes that leaves a block one step: with plans for a
# handful of blocks, loops and pipelines go round.
FEW_BLOCKS = (
    Edit("csrc/cuda/mma/token_pass.h", "kBlocks = 128, kMoreBlocks = 256;", "kBlocks = 4, kMoreBlocks = 8;"),
    Edit("csrc/cuda/mma/expand.cuh", "kTargetBlocks = 512;", "kTargetBlocks = 4;"),
    Edit("csrc/cuda/fma/plan.h", "kTargetBlocks = 384;", "kTargetBlocks = 4;"),
    Edit("csrc/cuda/merge.cuh", "kEnoughBlocks = 512;", "kEnoughBlocks = 2;"),
)


def few_blocks() -> Library:
    return edited_kernels("few_blocks", FEW_BLOCKS)
