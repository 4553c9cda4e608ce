"""Reads files that strangers wrote: JSON, safetensors and the index of sharded safetensors.

Everything is checked before anything large is allocated: a file is regular (a pipe may never end), JSON has a bounded
size and depth, and the safetensors library checks the header against the file's size. It maps the file, so memory is
taken only for tensors that are read.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_ext._common.messages import check_name, escaped, listed, shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The names of dtypes in the safetensors format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LARGEST_CONFIG = 16 << 20  # bytes; a config that names every expert of the largest mixtures has 8 million
_LARGEST_INDEX = 100_000_000  # bytes; the largest index of a real model has 20 million
_DEEPEST = 64  # levels of lists and objects; a model's config has 5
_LARGEST_SHAPE = 2**63 // 16  # elements: PyTorch counts bytes in 63 bits, also for tensors without elements
_MOST_DIMENSIONS = 64
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory"}
_FILE_NAME = re.compile(r"[^./\\:][^/\\:]{0,242}\.safetensors")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading. ValueError: it is a directory, pipe, socket or device."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # asked before it is opened, because opening a pipe waits
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, want a regular file")
    return open(path, "rb")


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, limit: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Reads the JSON object in the regular file ``path``, in UTF-8. OSError: as ``open``. ValueError: as parse_json."""
    with open_regular(path) as file:
        return parse_json(file.read(limit + 1), str(path), limit)


def parse_json(text: str | bytes, source: str, limit: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Parses the JSON object in ``text``; bytes are UTF-8.

    ValueError, which begins with ``source``: it is longer than ``limit``, not JSON, not an object or deeper than 64
    levels, or a string is not Unicode, so that no file or terminal takes it.
    """
    if len(text) > limit:
        raise ValueError(f"{source} is larger than {limit} bytes, the limit for it")
    try:
        values = json.loads(text.decode() if isinstance(text, bytes) else text)
        _check_depth(values, _DEEPEST)
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply: it has more than {_DEEPEST} levels") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}, want an object")
    return values


def _check_depth(value: Any, levels: int) -> None:
    """Raises RecursionError if lists and objects are nested deeper than ``levels``."""
    if not isinstance(value, dict | list):
        return
    if levels == 0:
        raise RecursionError
    for inner in value.values() if isinstance(value, dict) else value:
        _check_depth(inner, levels - 1)


# --- safetensors ------------------------------------------------------------------------------------------------------


class TensorInfo(NamedTuple):
    """Dtype, shape and place of a tensor in a safetensors file; ``begin`` is the offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[safe_open, dict[str, TensorInfo]]]:
    """Yields the safetensors library's handle of a file, and its tensors in the order of their bytes.

    ValueError: the file is corrupted, not a safetensors file or not regular; a name cannot be printed; PyTorch cannot
    hold a dtype (4 or 6 bits) or a shape.
    """
    with open_regular(path) as raw:
        end = 8 + int.from_bytes(raw.read(8), "little")
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: from PyTorch, if it has just been removed
        text = escaped(str(error))[:500]
        raise ValueError(f"{path} is corrupted or not a safetensors file: {text}") from error
    with file:
        table: dict[str, TensorInfo] = {}
        for name in file.offset_keys():  # the library has checked that tensors follow each other without gaps
            check_name(name, str(path))
            tensor = file.get_slice(name)
            dtype, shape = DTYPES.get(str(tensor.get_dtype())), tuple(tensor.get_shape())
            if dtype is None:
                raise ValueError(f"{path}: {name} has the dtype {tensor.get_dtype()}, which PyTorch cannot hold")
            if len(shape) > _MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) > _LARGEST_SHAPE:
                raise ValueError(f"{path}: {name} has a shape that PyTorch cannot hold: {shown(list(shape))}")
            table[name] = TensorInfo(dtype, shape, end)
            end += table[name].nbytes
        yield file, table


def tensor_table(path: Path) -> dict[str, TensorInfo]:
    """Reads the names, dtypes, shapes and places of a file's tensors. Errors as :func:`open_tensors`."""
    with open_tensors(path) as (_, table):
        return table


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Reads a tensor into new memory, on the CPU; later changes of the file do not reach it.

    OSError: as ``open``. ValueError: the file became shorter than when ``info`` was read.
    """
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with open_regular(path) as file:
        file.seek(info.begin)
        if file.readinto(tensor_bytes(tensor)) != info.nbytes:
            raise ValueError(f"{path} became shorter while it was read; read it again")
    return tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


# --- the index of several files ---------------------------------------------------------------------------------------


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, TensorInfo]]]:
    """Reads an index of tensors in several safetensors files of its directory, and the tables of these files, by name.

    FileNotFoundError: a file that it names is missing. ValueError: it has no ``weight_map`` from keys to names of
    safetensors files in the directory, or the files hold other tensors.
    """
    index = read_json(path, limit=_LARGEST_INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} is not an index of a checkpoint: weight_map is {shown(weight_map)}, want file names")
    for name in weight_map.values():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or not name.isprintable():
            wanted = "want a name without a path of up to 255 characters that ends with .safetensors"
            raise ValueError(f"{path} names the file {shown(name)}, {wanted}; nothing was read from it")
    names = list(dict.fromkeys(weight_map.values()))
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise FileNotFoundError(f"{path} names files that are missing:{listed(missing)}")
    shards = {name: tensor_table(path.parent / name) for name in names}
    counts = Counter(key for table in shards.values() for key in table)
    problems = [f"twice: {key}" for key, count in counts.items() if count > 1]
    problems += [f"not in {name}: {key}" for key, name in weight_map.items() if key not in shards[name]]
    problems += [f"not in the index: {key}" for key in counts if key not in weight_map]
    if problems:
        raise ValueError(f"{path} and its files disagree:{listed(problems)}")
    return index, shards
