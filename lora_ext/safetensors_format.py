"""The safetensors file format, for reading and writing a tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's dtype, shape, place), then
the tensors one after another. The safetensors library writes a file whole; here a header is written first and the bytes
follow as they are made.
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

__all__ = ["DTYPES", "DTYPE_NAMES", "TensorInfo", "encode_header", "read_header"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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

_LARGEST_HEADER = 100_000_000  # as the safetensors library: a file that claims more is none
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file, unread. ``begin`` is its first byte's offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a dtype that PyTorch lacks."""
        return DTYPES.get(self.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata.

    Raises:
        FileNotFoundError, OSError: as ``open``.
        ValueError: it is corrupted or no safetensors file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or length > min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"{path} is corrupted or not a safetensors file: it has {size} bytes and no whole header")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repetition)
        metadata = header.pop(_METADATA, {})
        tensors = {name: _tensor_info(values, 8 + length) for name, values in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is corrupted or not a safetensors file: its header is wrong: {error!r}") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end = 8 + length
    for name, info in ordered.items():
        if info.begin != end:
            raise ValueError(f"{path} is corrupted: {name!r} begins at byte {info.begin}, want {end}")
        end += info.nbytes
    if end != size:
        raise ValueError(f"{path} is corrupted or cut short: it has {size} bytes, its header describes {end}")
    return ordered, metadata


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """A file's bytes before its tensors, and where each tensor goes, in the order of the bytes.

    The widest dtypes come first, so that all tensors are aligned.

    Args:
        tensors: ``(dtype name, shape, bytes)`` by name.
        metadata: of the whole file; the Hugging Face libraries want ``{"format": "pt"}``.
    """
    header: dict[str, Any] = {}
    begin = 0
    widths = {name: nbytes // max(math.prod(shape), 1) for name, (_, shape, nbytes) in tensors.items()}
    for name in sorted(tensors, key=lambda name: (-widths[name], name)):
        dtype, shape, nbytes = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps({_METADATA: dict(metadata), **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {
        name: _tensor_info(values, 8 + len(text)) for name, values in header.items()
    }


def _tensor_info(values: dict[str, Any], data: int) -> TensorInfo:
    dtype, shape, (begin, end) = str(values["dtype"]), tuple(values["shape"]), values["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)) or end < begin:
        raise ValueError(f"shape {list(shape)}, data_offsets {[begin, end]}")
    info = TensorInfo(dtype, shape, data + begin, end - begin)
    if info.torch_dtype is not None and info.numel * info.torch_dtype.itemsize != info.nbytes:
        raise ValueError(f"{dtype} of shape {list(shape)} in {info.nbytes} bytes")
    return info


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values
