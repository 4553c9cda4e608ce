"""A whole checkpoint, written from blocks: its files, their index, and what the source has beside its weights."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint_files import INDEX_FILE, SINGLE_FILE, Checkpoint
from .merging import Block
from .other_files import copy_other_files
from .progress import progress
from .staging import Staging
from .writing import Description, compare_file, write_file

__all__ = ["Output", "Written", "check_apart"]


@dataclasses.dataclass(frozen=True)
class Written:
    """``kept``: files that an earlier run, which did not end, had made; ``skipped``: files that were not copied."""

    kept: int
    skipped: list[str]


@dataclasses.dataclass
class Output:
    """What a checkpoint is made of.

    Attributes:
        source: gives the metadata, and the other files.
        shards: file name -> the tensors in it.
        blocks: a tensor's values, by its key.
        blocks_again: the same, to compare with, where computing them has effects the first time.
        what: identifies all this: a run that did not end is continued where it is the same.
        config_changes: of ``config.json``.
        after_file: makes what belongs to a file, given the directory, before the file counts as finished; returns the
            names of what it made.
    """

    source: Checkpoint
    shards: dict[str, dict[str, Description]]
    blocks: Callable[[str], Iterator[Block]]
    what: Mapping[str, Any]
    config_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blocks_again: Callable[[str], Iterator[Block]] | None = None
    after_file: Callable[[Path, str], list[str]] = lambda directory, name: []

    @property
    def nbytes(self) -> int:
        return sum(nbytes for tensors in self.shards.values() for *_, nbytes in tensors.values())

    def write(self, out: Path, caller: str, *, verify: bool, overwrite: bool, show_progress: bool) -> Written:
        """Makes the directory ``out``, whole or not at all."""
        with Staging(out, self.what, overwrite) as staging:
            kept = sum(name in staging.finished for name in self.shards)
            _check_space(caller, out, self.nbytes - sum(staging.finished.values()))
            with progress(caller, self.nbytes * (1 + verify), show_progress) as shown:
                for name, tensors in self.shards.items():
                    shown.file(name)
                    if name in staging.finished:
                        shown.advance(sum(nbytes for *_, nbytes in tensors.values()))
                        continue
                    metadata = next(iter(self.source.metadata.values())) or {"format": "pt"}
                    write_file(staging.path / name, tensors, metadata, self.blocks, shown.advance)
                    staging.finish(name, *self.after_file(staging.path, name))
                for name, tensors in self.shards.items() if verify else ():
                    shown.file(name)
                    compare_file(staging.path / name, tensors, self.blocks_again or self.blocks, shown.advance)
            if list(self.shards) != [SINGLE_FILE] and (len(self.shards) > 1 or self.source.index is not None):
                (staging.path / INDEX_FILE).write_text(self._index(), encoding="utf-8")
            skipped = copy_other_files(self.source, staging.path, self.config_changes)
            staging.publish()
        return Written(kept, skipped)

    def _index(self) -> str:
        described = {key: one for tensors in self.shards.values() for key, one in tensors.items()}
        metadata = dict((self.source.index or {}).get("metadata") or {})
        metadata["total_size"] = self.nbytes
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(shape) for _, shape, _ in described.values())
        weight_map = {key: name for name, tensors in self.shards.items() for key in tensors}
        return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def check_apart(caller: str, out: Path, sources: Sequence[Path]) -> None:
    """ValueError where writing ``out`` would remove what is read."""
    for source in sources:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise ValueError(f"{caller}: out is {out}, which holds {source}, that is read; choose another directory")


def _check_space(caller: str, out: Path, needed: int) -> None:
    parent = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(f"{caller}: {out} takes {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free")
