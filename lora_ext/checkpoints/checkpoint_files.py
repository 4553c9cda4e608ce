"""A checkpoint of safetensors files, one or several, read by blocks of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.printable import check_name, shown
from lora_ext.files.file_bytes import check_unchanged, empty_block, file_state, fingerprint, read_into
from lora_ext.files.regular_file import open_regular
from lora_ext.files.safetensors_format import TensorInfo, read_header
from lora_ext.files.shard_index import check_shards, read_index

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_LARGEST_SHAPE = 2**63 // 16  # elements: PyTorch counts bytes in 63 bits, even for tensors without elements
_MOST_DIMENSIONS = 64
_FROM_GGUF = "save it as a directory of safetensors first (docs/language-models.md, Model)"


class Checkpoint:
    """The tensors of a directory, or of one file. Opening it reads only the files' headers.

    Attributes:
        directory: the directory of the files.
        shards: file name -> its tensors, in the order of their bytes.
        metadata: file name -> its metadata.
        index: content of the index file; None for a single file.
        is_directory: False if one file was opened: other files next to it may be unrelated.
    """

    def __init__(self, directory: Path, names: list[str], index: dict[str, Any] | None, is_directory: bool) -> None:
        self.directory, self.index, self.is_directory = directory, index, is_directory
        self._states = {name: file_state(directory / name) for name in names}
        headers = {name: read_header(directory / name) for name in names}
        self.shards: dict[str, dict[str, TensorInfo]] = {name: tensors for name, (tensors, _) in headers.items()}
        self.metadata: dict[str, dict[str, str]] = {name: metadata for name, (_, metadata) in headers.items()}
        self._shard_of = {key: name for name, tensors in self.shards.items() for key in tensors}
        for name, tensors in self.shards.items():
            for key, info in tensors.items():
                _check_tensor(directory / name, key, info)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Opens ``path``: a directory with an index and its files, a directory with one safetensors file, or a file.

        Raises:
            FileNotFoundError: a file is missing; the message names it.
            ValueError: a file is corrupted or no regular file; the index is wrong, or leads out of the directory, or
                disagrees with the files (the message lists every such key), or stands next to a single file; a name
                cannot be printed; a shape is larger than PyTorch can count.
        """
        path = Path(path)
        try:
            files = sorted(os.listdir(path))
        except NotADirectoryError:
            if path.suffix.lower() == ".gguf":
                raise ValueError(f"{path} is a GGUF file; {_FROM_GGUF}") from None
            return cls(path.parent, [path.name], None, is_directory=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} is missing; want a directory with {SINGLE_FILE} or {INDEX_FILE}"
            ) from error
        if INDEX_FILE in files:
            return cls._indexed(path, SINGLE_FILE in files)
        names = [file for file in files if file.endswith(".safetensors")]
        names = [file for file in names if not file.startswith(("adapter_model", "."))]
        if SINGLE_FILE in names:
            names = [SINGLE_FILE]
        if len(names) != 1:
            found = f"has {len(names)} safetensors files and no index" if names else f"has no {SINGLE_FILE}"
            pickled = [file for file in files if file.startswith("pytorch_model") and file.endswith(".bin")]
            advice = f"; {pickled[0]} is there: save it again as safetensors" if pickled else ""
            if not advice and (gguf := [file for file in files if file.lower().endswith(".gguf")]):
                advice = f"; {gguf[0]} is there: {_FROM_GGUF}"
            raise FileNotFoundError(f"{path} {found}{advice}")
        return cls(path, names, None, is_directory=True)

    @classmethod
    def _indexed(cls, directory: Path, is_single: bool) -> Checkpoint:
        path = directory / INDEX_FILE
        index, names = read_index(path)
        if is_single and SINGLE_FILE not in names:
            raise ValueError(
                f"{directory} has {SINGLE_FILE} and {INDEX_FILE}, which can be different weights (Transformers loads "
                "the first); remove the one that you do not mean, with its files"
            )
        checkpoint = cls(directory, names, index, is_directory=True)
        check_shards(path, index["weight_map"], checkpoint.shards)
        return checkpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def shard_of(self, key: str) -> str:
        """The name of the file that holds the tensor."""
        return self._shard_of[key]

    def info(self, key: str) -> TensorInfo:
        """The tensor's dtype, shape and place in its file."""
        return self.shards[self._shard_of[key]][key]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for tensors in self.shards.values() for info in tensors.values())

    def file(self, key: str) -> Path:
        """The path of the file that holds the tensor."""
        return self.directory / self._shard_of[key]

    def tensor(self, key: str) -> Tensor:
        """Reads a whole tensor into new memory."""
        return read_tensor(self.file(key), self.info(key))

    def elements(self, key: str, begin: int, end: int) -> Tensor:
        """Reads the elements ``begin`` to ``end`` of the flattened tensor into new memory: ``[end - begin]``."""
        info = self.info(key)
        values = empty_block(end - begin, dtype=_torch_dtype(self.file(key), info))
        with open_regular(self.file(key)) as file:
            read_into(file, info.begin + begin * values.itemsize, values)
        return values

    def fingerprint(self) -> list[list[Any]]:
        """Path, size and time of each file. A continued run compares them with those that it was started with."""
        return fingerprint([self.directory / name for name in self.shards], contents=False)

    def check_unchanged(self, caller: str) -> None:
        """Raises ValueError if a file has changed since it was opened: parts that were read may not fit each other."""
        check_unchanged({self.directory / name: state for name, state in self._states.items()}, caller)


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Reads a whole tensor of a file into new memory."""
    tensor = torch.empty(info.shape, dtype=_torch_dtype(path, info))
    with open_regular(path) as file:
        read_into(file, info.begin, tensor)
    return tensor


def _torch_dtype(path: Path, info: TensorInfo) -> torch.dtype:
    if info.torch_dtype is None:
        raise ValueError(f"{path} has a tensor of dtype {info.dtype}, which torch {torch.__version__} lacks")
    return info.torch_dtype


def raw_blocks(path: Path, info: TensorInfo, block_bytes: int) -> Iterator[Tensor]:
    """Reads a tensor of any dtype as bytes, in order, at most ``block_bytes`` at a time."""
    with open_regular(path) as file:
        for begin in range(0, info.nbytes, block_bytes):
            values = empty_block(min(block_bytes, info.nbytes - begin), dtype=torch.uint8)
            read_into(file, info.begin + begin, values)
            yield values


def _check_tensor(path: Path, key: str, info: TensorInfo) -> None:
    check_name(key, str(path))
    if len(info.shape) > _MOST_DIMENSIONS or math.prod(max(size, 1) for size in info.shape) > _LARGEST_SHAPE:
        raise ValueError(f"{path} has a tensor of a shape that PyTorch cannot hold: {key} {shown(list(info.shape))}")
