"""Headers of the safetensors format, for reading and writing files one tensor at a time.

A file holds the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor)
and the tensors. The safetensors library writes whole files only; here the header comes first and the bytes follow as
they are computed. Headers are read by the library, so that exactly the files that it accepts are accepted. Its tensors
are contiguous and in the order that it gives, so dtypes and shapes determine their places.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_ext._common.printable import escaped, shown
from lora_ext.files.regular_file import open_regular

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Dtypes that PyTorch lacks can be copied and compared, but not computed with.
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_LARGEST_HEADER = 100_000_000  # as in the safetensors library
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """Description of a tensor in a file. ``begin`` is the offset of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype in PyTorch; None if PyTorch lacks it."""
        return DTYPES.get(self.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads the header of a safetensors file: its tensors in the order of their bytes, and its metadata.

    Raises:
        OSError: as ``open``.
        ValueError: it is corrupted, not a safetensors file or not a regular file; it changed meanwhile; a tensor has a
            dtype that the installed library supports but this package does not.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(8))
        try:
            with safe_open(path, "pt") as library:
                metadata = library.metadata() or {}
                slices = [(name, library.get_slice(name)) for name in library.offset_keys()]
                described = [(name, str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices]
        except (SafetensorError, OSError) as error:
            text = escaped(str(error))[:500]
            raise ValueError(f"{path} is corrupted or not a safetensors file: {text}") from error
    tensors: dict[str, TensorInfo] = {}
    end = 8 + length
    for name, dtype, shape in described:
        if dtype not in _BITS:
            raise ValueError(f"{path} has a tensor of an unknown dtype, {dtype}: {shown(name)}")
        tensors[name] = TensorInfo(dtype, shape, end, math.prod(shape) * _BITS[dtype] // 8)
        end += tensors[name].nbytes
    if end != size:
        raise ValueError(f"{path} was changed while it was read: it had {size} bytes, its header describes {end}")
    return dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes, item[0]))), metadata


def header_bytes(path: Path) -> bytes:
    """Returns all bytes before the tensors of a safetensors file, fewer if it ends before: :func:`is_cut_off`."""
    with open_regular(path) as file:
        prefix = file.read(8)
        return prefix + file.read(min(_header_length(prefix), _LARGEST_HEADER))


def is_cut_off(header: bytes) -> bool:
    """Returns whether :func:`header_bytes` met the file's end: a stopped save left it, without any tensor."""
    length = _header_length(header[:8])
    return length <= _LARGEST_HEADER and len(header) < 8 + max(length, 1)


def _header_length(prefix: bytes) -> int:
    return struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Returns the bytes of a file before its tensors, and the place of each tensor, in the order of the bytes.

    The widest dtypes come first, so that all tensors are aligned.

    Args:
        tensors: ``(dtype name, shape, bytes)`` by name.
        metadata: metadata of the file, strings by strings; the Hugging Face libraries expect ``{"format": "pt"}``.

    Raises:
        ValueError: the library could not read the header: a tensor is called ``__metadata__``, metadata are not
            strings, a name is not Unicode, or the header exceeds 100 MB.
    """
    if _METADATA in tensors:
        raise ValueError(f"a tensor is called {_METADATA}, which a safetensors file cannot hold")
    for pair in metadata.items():
        if not all(isinstance(text, str) for text in pair):
            raise ValueError(f"the metadata of a safetensors file must be strings, got {shown(pair)}")
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    places: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    begin = 0
    for name in sorted(tensors, key=lambda name: (-_BITS[tensors[name][0]], name)):
        dtype, shape, nbytes = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        places[name] = dtype, shape, begin, nbytes
        begin += nbytes
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a name or the metadata is not Unicode: {shown(error.object[error.start - 20 :], 50)}"
        ) from error
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"the header of a safetensors file has {len(text)} bytes, more than {_LARGEST_HEADER}")
    data = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {
        name: TensorInfo(dtype, tuple(shape), data + begin, nbytes)
        for name, (dtype, shape, begin, nbytes) in places.items()
    }
