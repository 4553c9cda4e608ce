"""A checkpoint of safetensors files, one or several, read by blocks of rows."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from ..safetensors_format import TensorInfo, read_header

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Checkpoint", "raw_blocks", "read_into", "read_tensor", "tensor_bytes"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class Checkpoint:
    """The tensors of a directory, or of one file. Opening it reads the files' headers only.

    Attributes:
        directory: where the files are.
        shards: file name -> the tensors in it, in the order of their bytes.
        metadata: of each file.
        index: the content of the index file, or None where there is a single file.
        is_directory: not a lone file, whose neighbours may be anything.
    """

    def __init__(
        self,
        directory: Path,
        shards: dict[str, dict[str, TensorInfo]],
        metadata: dict[str, dict[str, str]],
        index: dict | None,
    ) -> None:
        self.directory, self.shards, self.metadata, self.index = directory, shards, metadata, index
        self.is_directory = True
        self._shard_of = {key: name for name, tensors in shards.items() for key in tensors}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Opens ``path``: a directory with an index and its files, or with one safetensors file, or such a file.

        Raises:
            FileNotFoundError: naming what is missing.
            ValueError: a file is corrupted; a path in the index leads out of the directory; the index and the files
                disagree: every such key is listed.
        """
        path = Path(path)
        if path.is_file():
            checkpoint = cls._of_files(path.parent, [path.name], None)
            checkpoint.is_directory = False
            return checkpoint
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is missing; want a directory with {SINGLE_FILE} or {INDEX_FILE}")
        if (path / INDEX_FILE).is_file():
            return cls._indexed(path)
        names = [file.name for file in sorted(path.glob("*.safetensors")) if not file.name.startswith("adapter_model")]
        if SINGLE_FILE in names:
            names = [SINGLE_FILE]
        if len(names) != 1:
            found = f"has {len(names)} safetensors files and no index" if names else f"has no {SINGLE_FILE}"
            pickled = [file.name for file in sorted(path.glob("pytorch_model*.bin"))]
            advice = f"; {pickled[0]} is there: save it again as safetensors" if pickled else ""
            raise FileNotFoundError(f"{path} {found}{advice}")
        return cls._of_files(path, names, None)

    @classmethod
    def _of_files(cls, directory: Path, names: list[str], index: dict | None) -> Checkpoint:
        headers = {name: read_header(directory / name) for name in names}
        return cls(
            directory,
            {name: tensors for name, (tensors, _) in headers.items()},
            {name: metadata for name, (_, metadata) in headers.items()},
            index,
        )

    @classmethod
    def _indexed(cls, directory: Path) -> Checkpoint:
        path = directory / INDEX_FILE
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            weight_map = dict(index["weight_map"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no index of a checkpoint: {error!r}") from error
        names = list(dict.fromkeys(weight_map.values()))
        for name in names:
            check_inside(path, name)
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{path} names files that are missing: {', '.join(missing)}")
        checkpoint = cls._of_files(directory, names, index)
        problems = [f"twice: {key}" for key, count in _counts(checkpoint.shards).items() if count > 1]
        problems += [f"not in {name}: {key}" for key, name in weight_map.items() if key not in checkpoint.shards[name]]
        problems += [f"not in the index: {key}" for key in checkpoint if key not in weight_map]
        if problems:
            raise ValueError(f"{path} and its files disagree:\n  " + "\n  ".join(problems))
        return checkpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def shard_of(self, key: str) -> str:
        return self._shard_of[key]

    def info(self, key: str) -> TensorInfo:
        return self.shards[self._shard_of[key]][key]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for tensors in self.shards.values() for info in tensors.values())

    def file(self, key: str) -> Path:
        return self.directory / self._shard_of[key]

    def tensor(self, key: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        return read_tensor(self.file(key), self.info(key))


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """A whole tensor of a file, in memory of its own."""
    if info.torch_dtype is None:
        raise ValueError(f"{path} has a tensor of dtype {info.dtype}, which torch {torch.__version__} lacks")
    tensor = torch.empty(info.shape, dtype=info.torch_dtype)
    with open(path, "rb", buffering=0) as file:
        read_into(file.fileno(), info.begin, tensor)
    return tensor


def raw_blocks(path: Path, info: TensorInfo, block_bytes: int) -> Iterator[Tensor]:
    """A tensor's bytes, of whatever dtype, in order and at most so many at a time."""
    with open(path, "rb", buffering=0) as file:
        for begin in range(0, info.nbytes, block_bytes):
            values = torch.empty(min(block_bytes, info.nbytes - begin), dtype=torch.uint8)
            read_into(file.fileno(), info.begin + begin, values)
            yield values


def check_inside(index: Path, name: object) -> None:
    """ValueError for a file name of an index that leads elsewhere than into the index's directory."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or PureWindowsPath(name).drive or "\\" in name:
        raise ValueError(f"{index} names the file {name!r}, which is outside its directory; nothing was read from it")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_into(fd: int, offset: int, tensor: Tensor) -> None:
    """Fills a contiguous CPU tensor with the bytes at ``offset`` of an open file."""
    if tensor.nbytes == 0:
        return
    view, done = tensor_bytes(tensor), 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise ValueError("a checkpoint's file became shorter while it was read")
        done += count


def _counts(shards: dict[str, dict[str, TensorInfo]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensors in shards.values():
        for key in tensors:
            counts[key] = counts.get(key, 0) + 1
    return counts
