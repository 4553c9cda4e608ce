"""Writes ``merge_record/`` (record_format.py) during a merge: the rounding corrections, and the base's digests."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.printable import check_name
from lora_ext._ops.checks_merge import merge_segments
from lora_ext.checkpoints.changes import MergeChanges
from lora_ext.checkpoints.checkpoint_files import Checkpoint, raw_blocks
from lora_ext.checkpoints.digests import Hasher, TextDigest
from lora_ext.checkpoints.merged_rows import BLOCK_BYTES, Block, blocks, factors, matrix_shape
from lora_ext.checkpoints.other_files import RECORD_DIRECTORY, list_other_files
from lora_ext.checkpoints.record_format import MANIFEST_FILE, BaseTensor, FileRecord, Manifest
from lora_ext.checkpoints.writing import Description, write_file
from lora_ext.files.file_bytes import empty_block, read_into, tensor_bytes, write_bytes
from lora_ext.files.safetensors_format import DTYPE_NAMES, DTYPES, header_bytes


@dataclasses.dataclass
class _Corrections:
    """A tensor's corrections: their offset in the spool, and the number of words of each segment."""

    offset: int
    words: list[Tensor] = dataclasses.field(default_factory=list)


class RecordWriter:
    """Merges tensors, and collects the record of one file's tensors until the file is written."""

    def __init__(self, changes: MergeChanges, base: Checkpoint) -> None:
        """Raises ValueError if the name of a file cannot be recorded."""
        self._changes, self._base, self._hasher = changes, base, Hasher()
        self._corrections: dict[str, _Corrections] = {}
        self._digests: dict[str, str] = {}
        self._spool: Any = None
        self._spool_end = 0
        for name in list_other_files(base)[0]:
            check_name(name, str(base.directory))

    def begin(self, directory: Path) -> None:
        """Opens a file without a name in ``directory``, whose disk has room for the output anyway."""
        (directory / RECORD_DIRECTORY).mkdir(exist_ok=True)
        self._spool = tempfile.TemporaryFile(buffering=0, dir=directory)  # noqa: SIM115  is closed with this object

    def blocks(self, key: str) -> Iterator[Block]:
        """Merges the tensor ``key`` block by block, and keeps its record."""
        tensor = self._changes.tensors[key]
        if tensor.source is None:
            yield from blocks(tensor, key, self._base, None)
            return
        info = self._base.info(tensor.source)
        digest = self._hasher.tensor(info.dtype, info.shape)
        if tensor.replacement is not None:
            for values in raw_blocks(self._base.file(tensor.source), info, BLOCK_BYTES):
                digest.update(tensor_bytes(values))
            yield from blocks(tensor, key, self._base, None)
        elif not tensor.terms:
            yield from blocks(tensor, key, self._base, None, before=digest.update)
        else:
            kept = self._corrections[key] = _Corrections(self._spool_end)
            segments = merge_segments(matrix_shape(tensor)[1])
            for block in blocks(tensor, key, self._base, None, record=True, before=digest.update):
                for first, last, record in block.records:
                    none = torch.zeros(last - first, segments, dtype=torch.int16)
                    kept.words.append(none if record.words is None else record.words)
                    if record.corrections is not None:
                        write_bytes(self._spool, self._spool_end, tensor_bytes(record.corrections))
                        self._spool_end += record.corrections.nbytes
                yield block
        self._digests[key] = digest.hexdigest()

    def write(self, directory: Path, name: str, tensors: Mapping[str, Description]) -> list[str]:
        """Writes the record of the file ``name``, which has just been written. Returns the record's file name."""
        parts: dict[str, Tensor | Callable[[], Iterator[Tensor]]] = {}
        described: dict[str, Description] = {}
        base_tensors: dict[str, BaseTensor] = {}
        for key in tensors:
            tensor = self._changes.tensors[key]
            if tensor.source is None:
                continue
            info = self._base.info(tensor.source)
            base_tensors[key] = BaseTensor(info.dtype, info.shape, self._digests[key])
            if tensor.replacement is not None:
                described[f"{key}:base"] = info.dtype, info.shape, info.nbytes
                parts[f"{key}:base"] = lambda source=tensor.source: raw_blocks(
                    self._base.file(source), self._base.info(source), BLOCK_BYTES
                )
                continue
            if tensor.rows:
                indices = torch.tensor([index for *_, rows in tensor.rows for index in rows])
                parts[f"{key}:indices"] = indices
                parts[f"{key}:rows"] = self._base_rows(tensor.source, indices.tolist())
            if (kept := self._corrections.get(key)) is not None:
                parts[f"{key}:words"] = torch.cat(kept.words)
                count = int(parts[f"{key}:words"].sum(dtype=torch.int64))
                described[f"{key}:corrections"] = DTYPE_NAMES[torch.int16], (count,), 2 * count
                parts[f"{key}:corrections"] = lambda kept=kept, count=count: self._read_corrections(kept.offset, count)
                for i, pair in enumerate(factors(tensor, DTYPES[tensor.dtype])):
                    parts |= {f"{key}:lora_A.{i}": pair.lora_A, f"{key}:lora_B.{i}": pair.lora_B}
        for part, content in parts.items():
            if isinstance(content, Tensor):
                described[part] = DTYPE_NAMES[content.dtype], tuple(content.shape), content.nbytes

        def part_blocks(part: str) -> Iterator[Block]:
            content = parts[part]
            for values in (content,) if isinstance(content, Tensor) else content():
                yield Block(values)

        added = [key for key in tensors if self._changes.tensors[key].source is None]
        metadata = FileRecord(base_tensors, added).to_metadata()
        write_file(directory / RECORD_DIRECTORY / name, described, metadata, part_blocks)
        self._corrections.clear()
        self._digests.clear()
        self._spool_end = 0
        self._spool.truncate(0)
        return [f"{RECORD_DIRECTORY}/{name}"]

    def finish(
        self,
        directory: Path,
        metadata: Mapping[str, Mapping[str, str]],
        index_metadata: Mapping[str, Any],
        other_files: Mapping[str, str],
    ) -> None:
        """Writes the manifest, after all files of the checkpoint and the other files.

        Args:
            metadata: file of the checkpoint -> its metadata.
            other_files: file copied from the base -> digest.
        """
        records = directory / RECORD_DIRECTORY
        files = {name: TextDigest(header_bytes(records / name)).hexdigest() for name in metadata}
        metadata = {name: dict(values) for name, values in metadata.items()}
        Manifest(files, metadata, dict(index_metadata), dict(other_files)).write(records / MANIFEST_FILE)

    def _read_corrections(self, offset: int, count: int) -> Iterator[Tensor]:
        for begin in range(0, count, BLOCK_BYTES // 2):
            values = empty_block(min(BLOCK_BYTES // 2, count - begin), dtype=torch.int16)
            read_into(self._spool, offset + 2 * begin, values)
            yield values

    def _base_rows(self, key: str, indices: list[int]) -> Tensor:
        info = self._base.info(key)
        row_bytes = info.nbytes // info.shape[0]
        rows = torch.empty(len(indices), *info.shape[1:], dtype=DTYPES[info.dtype])
        with open(self._base.file(key), "rb", buffering=0) as file:
            for i, index in enumerate(indices):
                read_into(file, info.begin + index * row_bytes, rows[i])
        return rows
