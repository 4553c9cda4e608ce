"""Reads ``merge_record/`` (record_format.py): restores every bit of a merged checkpoint's base, or raises an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lora_ext._common.printable import listed
from lora_ext._ops.checks import FLOATING, accumulation_dtype
from lora_ext._ops.checks_merge import merge_segments
from lora_ext.checkpoints.checkpoint_files import Checkpoint, raw_blocks, read_tensor
from lora_ext.checkpoints.digests import Hasher, TextDigest
from lora_ext.checkpoints.merged_rows import BLOCK_BYTES, Block
from lora_ext.checkpoints.other_files import RECORD_DIRECTORY
from lora_ext.checkpoints.record_format import MANIFEST_FILE, BaseTensor, FileRecord, Manifest
from lora_ext.files.file_bytes import empty_block, read_into, tensor_bytes
from lora_ext.files.regular_file import open_regular
from lora_ext.files.safetensors_format import DTYPES, TensorInfo, header_bytes, read_header
from lora_ext.merging.weights import MergeRecord, unmerge_all_


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A tensor of the base: its description, and the unread parts of its record in the file ``path``."""

    base: BaseTensor
    path: Path
    parts: dict[str, TensorInfo]

    def read(self, part: str) -> Tensor:
        return read_tensor(self.path, self.parts[part])

    @property
    def num_pairs(self) -> int:
        return sum(part.startswith("lora_A.") for part in self.parts)


class Record:
    """The opened record of a merged checkpoint. Opening it reads no tensor.

    Attributes:
        manifest: describes the whole checkpoint.
        added: keys of the checkpoint that the base lacks.
        files: paths of the record's files.
    """

    def __init__(self, merged: Checkpoint, caller: str = "unmerge") -> None:
        """Raises OSError or ValueError if the record is missing, incomplete, corrupted, or of another checkpoint."""
        self._merged, self._caller, self._hasher = merged, caller, Hasher()
        directory = merged.directory / RECORD_DIRECTORY
        self.manifest = Manifest.read(directory / MANIFEST_FILE, caller)
        self.files = [directory / MANIFEST_FILE, *(directory / name for name in self.manifest.files)]
        problems = [f"not of this merge: {name}" for name in merged.shards if name not in self.manifest.files]
        problems += [f"missing: {name}" for name in self.manifest.files if name not in merged.shards]
        if problems:
            raise ValueError(f"{caller}: {merged.directory} has other files than its record:{listed(problems)}")
        self._kept: dict[str, _Kept] = {}
        self.added: set[str] = set()
        for name in merged.shards:
            self._open(directory / name, name)

    def _open(self, path: Path, name: str) -> None:
        """Reads the header of the record of the checkpoint's file ``name``, and compares it with that file."""
        parts, metadata = read_header(path)
        if TextDigest(header_bytes(path)).hexdigest() != self.manifest.files[name]:
            raise ValueError(f"{self._caller}: {path} was changed since the merge wrote it, or is of another merge")
        header = FileRecord.from_metadata(path, metadata)
        tensors = self._merged.shards[name]
        problems = [
            f"not of this merge: {key}" for key in tensors if key not in header.tensors and key not in header.added
        ]
        problems += [f"missing: {key}" for key in [*header.tensors, *header.added] if key not in tensors]
        if problems:
            file = self._merged.directory / name
            raise ValueError(f"{self._caller}: {file} has other tensors than its record:{listed(problems)}")
        by_key: dict[str, dict[str, TensorInfo]] = {key: {} for key in header.tensors}
        for part, info in parts.items():
            key, _, kind = part.rpartition(":")
            if key not in by_key:
                raise ValueError(f"{self._caller}: {path} has a part of an unknown tensor: {part}")
            by_key[key][kind] = info
        for key, base in header.tensors.items():
            kept = _Kept(base, path, by_key[key])
            if wrong := _misfit(kept, tensors[key]):
                raise ValueError(f"{self._caller}: {key} is not as it was merged: {wrong}")
            self._kept[key] = kept
        self.added |= set(header.added)

    @property
    def num_tensors(self) -> int:
        """Number of tensors of the base that the merge has changed."""
        return sum(bool(kept.parts) for kept in self._kept.values())

    def info(self, key: str) -> TensorInfo:
        """Dtype, shape and place of the base's tensor ``key``, in the record or in the merged checkpoint."""
        return self._kept[key].parts.get("base", self._merged.info(key))

    def restored(self, key: str) -> Iterator[Block]:
        """Restores the values of the base's tensor ``key``.

        Raises:
            ValueError: after the last block, if the digest shows that the values are not the base's, because the merged
                tensor or its record was changed.
        """
        kept = self._kept[key]
        if "words" in kept.parts or "rows" in kept.parts:
            made = self._unmerged(key, kept)
        elif "base" in kept.parts:
            made = raw_blocks(kept.path, kept.parts["base"], BLOCK_BYTES)
        else:
            made = raw_blocks(self._merged.file(key), self._merged.info(key), BLOCK_BYTES)
        digest = self._hasher.tensor(kept.base.dtype, kept.base.shape)
        for values in made:
            with digest.reading(tensor_bytes(values)):
                yield Block(values)
        if digest.hexdigest() != kept.base.digest:
            raise ValueError(
                f"{self._caller}: {key} was changed since it was merged, in {self._merged.file(key)} or in "
                f"{kept.path}; its old bits cannot be restored"
            )

    def _unmerged(self, key: str, kept: _Kept) -> Iterator[Tensor]:
        info, dtype = self._merged.info(key), DTYPES[kept.base.dtype]
        words = kept.read("words") if "words" in kept.parts else None
        pairs = [(kept.read(f"lora_A.{i}"), kept.read(f"lora_B.{i}")) for i in range(kept.num_pairs)]
        originals = self._original_rows(key, kept)
        rows = info.shape[0] if words is None else len(words)
        cols = info.numel // max(rows, 1)
        per_pair = rows // max(len(pairs), 1)
        height = max(BLOCK_BYTES // max(cols * dtype.itemsize, 1), 1)
        begins = range(0, rows, height)
        if pairs:  # a block has the factors of one matrix
            begins = [begin for i in range(len(pairs)) for begin in range(i * per_pair, (i + 1) * per_pair, height)]
            if (words < 0).any() or words.sum(dtype=torch.int64) != kept.parts["corrections"].numel:
                raise ValueError(
                    f"{self._caller}: {kept.path} is not a record of a merge: it miscounts {key}'s corrections"
                )
        position = 0
        with open_regular(self._merged.file(key)) as file, open_regular(kept.path) as record_file:
            for begin in begins:
                end = min(begin + height, (begin // per_pair + 1) * per_pair if pairs else rows)
                values = empty_block(end - begin, cols, dtype=dtype)
                read_into(file, info.begin + begin * cols * values.itemsize, values)
                if pairs:
                    A, B = pairs[begin // per_pair]
                    block_words = words[begin:end].contiguous()
                    corrections = empty_block(int(block_words.sum(dtype=torch.int64)), dtype=torch.int16)
                    read_into(record_file, kept.parts["corrections"].begin + 2 * position, corrections)
                    position += len(corrections)
                    first = begin - begin // per_pair * per_pair
                    record = MergeRecord(A, B[first : first + end - begin], values.dtype, block_words, corrections)
                    unmerge_all_(self._caller, [values], [record], [key])
                for index, row in originals.items():
                    if begin <= index < end:
                        values[index - begin] = row.reshape(-1)
                yield values

    def _original_rows(self, key: str, kept: _Kept) -> dict[int, Tensor]:
        if "rows" not in kept.parts:
            return {}
        indices = kept.read("indices").tolist()
        if len(set(indices)) < len(indices) or not all(0 <= index < kept.base.shape[0] for index in indices):
            raise ValueError(
                f"{self._caller}: {kept.path} is not a record of a merge: it names rows that {key} does not have"
            )
        return dict(zip(indices, kept.read("rows"), strict=True))


def _misfit(kept: _Kept, merged: TensorInfo) -> str:
    """Says why a tensor of the merged checkpoint cannot be the merge's result for the base's; "" if it can."""
    base, parts = kept.base, kept.parts

    def describe(dtype: str, shape: tuple[int, ...]) -> str:
        return f"{dtype} {list(shape)}"

    def has(kind: str, dtype: torch.dtype, *shape: int | None) -> bool:
        """Returns whether there is such a part. None stands for any size."""
        part = parts.get(kind)
        fits = part is not None and part.torch_dtype == dtype and len(part.shape) == len(shape)
        return fits and all(size in (None, actual) for size, actual in zip(shape, part.shape, strict=True))

    stored = parts.get("base", merged)
    if (stored.dtype, stored.shape) != (base.dtype, base.shape):
        return f"it is {describe(stored.dtype, stored.shape)}, and was {describe(base.dtype, base.shape)}"
    expected = {"base"} & parts.keys()
    if "rows" in parts:
        fits = base.shape and has("indices", torch.int64, parts["rows"].shape[0] if parts["rows"].shape else -1)
        if not fits or not has("rows", stored.torch_dtype, None, *base.shape[1:]):
            return "the rows that were replaced in it do not fit it"
        expected |= {"rows", "indices"}
    if "words" in parts:
        if stored.torch_dtype not in FLOATING:
            return f"it is {stored.dtype}, which nothing is merged into"
        words, pairs = parts["words"].shape, kept.num_pairs
        rows = words[0] if len(words) == 2 else 0
        if rows == 0 or pairs == 0 or merged.numel % rows or rows % pairs or merged.numel == 0:
            return "its record does not fit its shape"
        cols, factor = merged.numel // rows, accumulation_dtype(stored.torch_dtype)
        fits = has("words", torch.int16, rows, merge_segments(cols)) and has("corrections", torch.int16, None)
        for i in range(pairs):
            rank = parts[f"lora_A.{i}"].shape[0] if has(f"lora_A.{i}", factor, None, cols) else None
            fits = fits and rank is not None and has(f"lora_B.{i}", factor, rows // pairs, rank)
        if not fits:
            return "its record does not fit its shape"
        expected |= {"words", "corrections"} | {f"lora_{side}.{i}" for side in "AB" for i in range(pairs)}
    if parts.keys() != expected or (len(expected) > 1 and "base" in expected):
        return f"its record has parts that do not belong together: {', '.join(sorted(parts))}"
    return ""
