"""Writes a whole checkpoint from blocks: its files, their index, and copies of the source's other files."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ext._common.progress import Progress, progress
from lora_ext.checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE, Checkpoint
from lora_ext.checkpoints.merged_rows import Block
from lora_ext.checkpoints.other_files import (
    CONFIG_FILE,
    RECORD_DIRECTORY,
    copy_file,
    list_other_files,
    write_model_config,
)
from lora_ext.checkpoints.staging import Staging
from lora_ext.checkpoints.writing import Description, compare_file, write_file

if TYPE_CHECKING:
    from lora_ext.checkpoints.record_writer import RecordWriter

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|" + re.escape(INDEX_FILE))


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of writing a checkpoint.

    Attributes:
        kept: number of files that an interrupted run had written.
        copied: path -> digest of each copied file next to the weights.
        skipped: files that were not copied because they hold the weights again.
    """

    kept: int
    copied: dict[str, str]
    skipped: list[str]


@dataclasses.dataclass
class Output:
    """A checkpoint to be written.

    Attributes:
        source: the checkpoint whose other files are copied.
        shards: file name -> its tensors.
        blocks: returns the values of a tensor, given its key.
        metadata: file name -> its metadata.
        index_metadata: metadata of the index.
        what: identifies the output. An interrupted run is continued if this is equal.
        config_changes: changes of ``config.json``.
        recorder: if given, its blocks are written instead of ``blocks``, and then its record.
    """

    source: Checkpoint
    shards: dict[str, dict[str, Description]]
    blocks: Callable[[str], Iterator[Block]]
    metadata: Mapping[str, Mapping[str, str]]
    index_metadata: Mapping[str, Any]
    what: Mapping[str, Any]
    config_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recorder: RecordWriter | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes for tensors in self.shards.values() for *_, nbytes in tensors.values())

    def write(self, out: Path, caller: str, *, verify: bool, overwrite: bool, show_progress: bool) -> Written:
        """Writes the directory ``out``, whole or not at all."""
        with Staging(out, self.what, overwrite, self._writes) as staging:
            kept = sum(name in staging.finished for name in self.shards)
            _check_space(caller, out, self.nbytes - sum(staging.finished.values()))
            with progress(caller, self.nbytes * (1 + verify), show=show_progress) as shown:
                self._write_shards(staging, shown)
                for name, tensors in self.shards.items() if verify else ():
                    shown.note(name)
                    compare_file(staging.path / name, tensors, self.blocks, shown.advance)
            if list(self.shards) != [SINGLE_FILE] and (len(self.shards) > 1 or self.source.index is not None):
                (staging.path / INDEX_FILE).write_text(self._index(), encoding="utf-8")
            copied, skipped = self._copy_other_files(staging.path)
            if self.recorder is not None:
                metadata = shard_metadata(self.source, self.shards)
                self.recorder.finish(staging.path, metadata, self.index_metadata, copied)
            self.source.check_unchanged(caller)
            staging.publish()
        return Written(kept, copied, skipped)

    def _writes(self, name: str) -> bool:
        """Returns whether a file of this name is one that this run writes, or that an earlier one of its kind wrote."""
        weights = name in self.shards or _WEIGHTS.fullmatch(name) is not None
        return weights or name.startswith(f"{RECORD_DIRECTORY}/") or name in self._other_files[0]

    @functools.cached_property
    def _other_files(self) -> tuple[list[str], list[str]]:
        return list_other_files(self.source)

    def _write_shards(self, staging: Staging, shown: Progress) -> None:
        if self.recorder is not None:
            self.recorder.begin(staging.path)
        blocks = self.blocks if self.recorder is None else self.recorder.blocks
        for name, tensors in self.shards.items():
            shown.note(name)
            if name in staging.finished:
                shown.advance(sum(nbytes for *_, nbytes in tensors.values()))
                continue
            write_file(staging.path / name, tensors, self.metadata[name], blocks, shown.advance)
            recorded = [] if self.recorder is None else self.recorder.write(staging.path, name, tensors)
            staging.finish(name, *recorded)

    def _copy_other_files(self, directory: Path) -> tuple[dict[str, str], list[str]]:
        names, skipped = self._other_files
        copied = {}
        for name in names:
            if name == CONFIG_FILE and self.config_changes:
                write_model_config(self.source, directory, self.config_changes)
            else:
                copied[name] = copy_file(self.source.directory / name, directory / name)
        return copied, skipped

    def _index(self) -> str:
        described = {key: one for tensors in self.shards.values() for key, one in tensors.items()}
        metadata = dict(self.index_metadata) | {"total_size": self.nbytes}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(shape) for _, shape, _ in described.values())
        weight_map = {key: name for name, tensors in self.shards.items() for key in tensors}
        return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def shard_metadata(source: Checkpoint, shards: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Metadata for each file: that of the file of the same name in ``source``, or else of its first file."""
    first = next(iter(source.metadata.values()))
    return {name: source.metadata.get(name, first) or {"format": "pt"} for name in shards}


def index_metadata(source: Checkpoint) -> dict[str, Any]:
    """The metadata in the index of ``source``; empty without an index."""
    return (source.index or {}).get("metadata") or {}


def check_apart(caller: str, out: Path, sources: Sequence[Path]) -> None:
    """Raises ValueError if writing ``out`` would remove a source."""
    for source in sources:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise ValueError(f"{caller}: out is {out}, which contains the input {source}; choose another directory")


def _check_space(caller: str, out: Path, needed: int) -> None:
    parent = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"{caller}: {out} takes {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free; free some "
            "space, or choose another directory"
        )
