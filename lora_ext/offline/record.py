"""What a merge on disk loses, kept beside its result: ``merge_record/<file>`` for each file of the checkpoint.

For a tensor ``key`` that updates were merged into, the parts of its :class:`~lora_ext.exact_merge.MergeRecord`:
``key:lora_A.<i>``, ``key:lora_B.<i>`` (of each matrix of a stack), ``key:words`` and ``key:corrections``. Of replaced
rows the base's, ``key:rows`` and ``key:indices``; of a replaced tensor the base's whole, ``key:base``. The metadata has
a checksum of each merged tensor of the base, and the keys that the base lacks.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._checks import merge_segments
from ..exact_merge import MergeRecord, unmerge_all_
from ..safetensors_format import DTYPE_NAMES, DTYPES, TensorInfo, read_header
from .checkpoint_files import Checkpoint, raw_blocks, read_into, read_tensor, tensor_bytes
from .merging import BLOCK_BYTES, Block, factors, matrix_shape
from .other_files import RECORD_DIRECTORY
from .plan import MergePlan
from .writing import Description, write_file

__all__ = ["Record", "RecordWriter"]


@dataclasses.dataclass
class _Kept:
    """Of one tensor: its corrections' place in the spool, how many words each segment has, and the base's checksum."""

    offset: int
    words: list[Tensor] = dataclasses.field(default_factory=list)
    checksum: int = 0


class RecordWriter:
    """Collects the records of one file's tensors as they are merged, and writes them when the file is done."""

    def __init__(self, plan: MergePlan, base: Checkpoint) -> None:
        self._plan, self._base = plan, base
        self._kept: dict[str, _Kept] = {}
        self._spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  of nobody else, and gone with the process

    def watch(self, key: str, made: Iterator[Block]) -> Iterator[Block]:
        """The blocks of the tensor ``key``, once what they lost is noted."""
        tensor = self._plan.tensors[key]
        if not tensor.terms or tensor.replacement:
            yield from made
            return
        kept = self._kept[key] = _Kept(self._spool.tell())
        segments = merge_segments(matrix_shape(tensor)[1])
        for block in made:
            for first, last, record in block.records:
                none = torch.zeros(last - first, segments, dtype=torch.int16)
                kept.words.append(none if record.words is None else record.words)
                if record.corrections is not None:
                    self._spool.write(tensor_bytes(record.corrections))
            kept.checksum = block.checksum
            yield block

    def write(self, directory: Path, name: str, tensors: Mapping[str, Description]) -> list[str]:
        """Writes the record of the file ``name``, which has just been written; returns the name of its own file."""
        parts: dict[str, Tensor | Callable[[], Iterator[Tensor]]] = {}
        described: dict[str, Description] = {}
        for key in tensors:
            tensor = self._plan.tensors[key]
            if tensor.source is not None and tensor.replacement is not None:
                info = self._base.info(tensor.source)
                described[f"{key}:base"] = info.dtype, info.shape, info.nbytes
                parts[f"{key}:base"] = lambda own=tensor.source: raw_blocks(
                    self._base.file(own), self._base.info(own), BLOCK_BYTES
                )
                continue
            if tensor.rows:
                indices = torch.tensor([index for *_, own in tensor.rows for index in own])
                parts[f"{key}:indices"] = indices
                parts[f"{key}:rows"] = self._base_rows(tensor.source, indices.tolist())
            if (kept := self._kept.get(key)) is not None:
                parts[f"{key}:words"] = torch.cat(kept.words)
                count = int(parts[f"{key}:words"].sum(dtype=torch.int64))
                described[f"{key}:corrections"] = DTYPE_NAMES[torch.int16], (count,), 2 * count
                parts[f"{key}:corrections"] = lambda kept=kept, count=count: self._corrections(kept.offset, count)
                for i, own in enumerate(factors(tensor, DTYPES[tensor.dtype])):
                    parts |= {f"{key}:lora_A.{i}": own.lora_A, f"{key}:lora_B.{i}": own.lora_B}
        for part, content in parts.items():
            if isinstance(content, Tensor):
                described[part] = DTYPE_NAMES[content.dtype], tuple(content.shape), content.nbytes

        def blocks(part: str) -> Iterator[Block]:
            content = parts[part]
            for values in (content,) if isinstance(content, Tensor) else content():
                yield Block(values)

        metadata = {
            "format": "pt",
            "added": json.dumps([key for key in tensors if self._plan.tensors[key].source is None]),
            "checksums": json.dumps({key: kept.checksum for key, kept in self._kept.items()}),
        }
        (directory / RECORD_DIRECTORY).mkdir(exist_ok=True)
        write_file(directory / RECORD_DIRECTORY / name, described, metadata, blocks)
        self._kept.clear()
        self._spool.seek(0)
        self._spool.truncate()
        return [f"{RECORD_DIRECTORY}/{name}"]

    def _corrections(self, offset: int, count: int) -> Iterator[Tensor]:
        for begin in range(0, count, BLOCK_BYTES // 2):
            values = torch.empty(min(BLOCK_BYTES // 2, count - begin), dtype=torch.int16)
            read_into(self._spool.fileno(), offset + 2 * begin, values)
            yield values

    def _base_rows(self, key: str, indices: list[int]) -> Tensor:
        info = self._base.info(key)
        row_bytes = info.nbytes // info.shape[0]
        rows = torch.empty(len(indices), *info.shape[1:], dtype=DTYPES[info.dtype])
        with open(self._base.file(key), "rb", buffering=0) as file:
            for i, index in enumerate(indices):
                read_into(file.fileno(), info.begin + index * row_bytes, rows[i])
        return rows


class Record:
    """The record of a merged checkpoint, opened; no tensor is read.

    Attributes:
        added: keys of the checkpoint that the base lacks.
    """

    def __init__(self, merged: Checkpoint) -> None:
        """Raises FileNotFoundError or ValueError: the record is missing, not whole, or corrupted."""
        self._merged = merged
        self._parts: dict[str, tuple[Path, TensorInfo]] = {}
        self._checksums: dict[str, int] = {}
        self.added: set[str] = set()
        for name in merged.shards:
            path = merged.directory / RECORD_DIRECTORY / name
            tensors, metadata = read_header(path)
            self._parts |= {part: (path, info) for part, info in tensors.items()}
            try:
                self.added |= set(json.loads(metadata["added"]))
                self._checksums |= json.loads(metadata["checksums"])
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path} is no record of a merge") from error

    @property
    def files(self) -> list[Path]:
        return [self._merged.directory / RECORD_DIRECTORY / name for name in self._merged.shards]

    @property
    def num_tensors(self) -> int:
        """Of the base, that the merge had changed."""
        return len({part.rpartition(":")[0] for part in self._parts})

    def info(self, key: str) -> TensorInfo:
        """Of the base's tensor."""
        return self._parts[f"{key}:base"][1] if f"{key}:base" in self._parts else self._merged.info(key)

    def restored(self, key: str) -> Iterator[Block]:
        """The values of the base's tensor ``key``.

        Raises:
            ValueError: the merged tensor was changed since, so that the base's cannot be restored.
        """
        whole = self._parts.get(f"{key}:base")
        if whole is not None:
            path, info = whole
            for values in raw_blocks(path, info, BLOCK_BYTES):
                yield Block(values)
        elif f"{key}:words" in self._parts or f"{key}:rows" in self._parts:
            yield from self._unmerged(key)
        else:
            for values in raw_blocks(self._merged.file(key), self._merged.info(key), BLOCK_BYTES):
                yield Block(values)

    def _unmerged(self, key: str) -> Iterator[Block]:
        info = self._merged.info(key)
        words = self._part(f"{key}:words")
        pairs = []
        while (A := self._part(f"{key}:lora_A.{len(pairs)}")) is not None:
            pairs.append((A, self._part(f"{key}:lora_B.{len(pairs)}")))
        originals = dict(zip(self._part(f"{key}:indices", []), self._part(f"{key}:rows", []), strict=True))
        originals = {int(index): row for index, row in originals.items()}
        rows = info.shape[0] if words is None else len(words)
        cols = info.numel // max(rows, 1)
        per_pair = rows // max(len(pairs), 1)
        height = max(BLOCK_BYTES // max(cols * DTYPES[info.dtype].itemsize, 1), 1)
        begins = range(0, rows, height)
        if pairs:  # a block has the factors of one matrix
            begins = [begin for i in range(len(pairs)) for begin in range(i * per_pair, (i + 1) * per_pair, height)]
        position = checksum = 0
        with open(self._merged.file(key), "rb", buffering=0) as file:
            for begin in begins:
                end = min(begin + height, (begin // per_pair + 1) * per_pair if pairs else rows)
                values = torch.empty(end - begin, cols, dtype=DTYPES[info.dtype])
                read_into(file.fileno(), info.begin + begin * cols * values.itemsize, values)
                if pairs:
                    A, B = pairs[begin // per_pair]
                    own = words[begin:end].contiguous()
                    corrections = torch.empty(int(own.sum(dtype=torch.int64)), dtype=torch.int16)
                    self._read_corrections(key, position, corrections)
                    position += len(corrections)
                    first = begin - begin // per_pair * per_pair
                    record = MergeRecord(A, B[first : first + end - begin], values.dtype, own, corrections)
                    unmerge_all_("unmerge", [values], [record], [key])
                for index, row in originals.items():
                    if begin <= index < end:
                        values[index - begin] = row.reshape(-1)
                checksum = zlib.crc32(tensor_bytes(values), checksum)
                yield Block(values)
        if self._checksums.get(key, checksum) != checksum:
            raise ValueError(f"unmerge: {key} was changed since it was merged; its old bits cannot be restored")

    def _read_corrections(self, key: str, position: int, values: Tensor) -> None:
        path, info = self._parts[f"{key}:corrections"]
        if position + len(values) > info.numel:
            raise ValueError(f"{path} is no record of a merge: it lacks corrections of {key}")
        with open(path, "rb", buffering=0) as file:
            read_into(file.fileno(), info.begin + 2 * position, values)

    def _part(self, part: str, default=None):
        return read_tensor(*self._parts[part]) if part in self._parts else default
