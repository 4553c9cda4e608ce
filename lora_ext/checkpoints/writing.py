"""Writes one file of a checkpoint, or compares it, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from lora_ext.checkpoints.merged_rows import Block
from lora_ext.files.file_bytes import empty_block, read_into, tensor_bytes, write_bytes
from lora_ext.files.regular_file import open_regular
from lora_ext.files.safetensors_format import TensorInfo, encode_header, read_header

Description: TypeAlias = tuple[str, tuple[int, ...], int]
"""A tensor's dtype (its name in the file format), shape, and bytes."""


def write_file(
    path: Path,
    tensors: Mapping[str, Description],
    metadata: Mapping[str, str],
    blocks: Callable[[str], Iterator[Block]],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes a safetensors file. ``blocks(key)`` yields the values of a tensor in order; it is called once for each."""
    header, places = encode_header(tensors, metadata)
    with open(path, "wb", buffering=0) as file:
        write_bytes(file, 0, memoryview(header))
        for key, info in places.items():
            offset = info.begin
            for block in blocks(key):
                values = block.values.contiguous()
                write_bytes(file, offset, tensor_bytes(values))
                offset += values.nbytes
                advance(values.nbytes)
            if offset != info.begin + info.nbytes:
                raise RuntimeError(f"{key}: {offset - info.begin} bytes were made, want {info.nbytes}")


def compare_file(
    path: Path,
    tensors: Mapping[str, Description],
    blocks: Callable[[str], Iterator[Block]],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Reads a file back and compares it bit by bit with the expected tensors.

    Raises:
        RuntimeError: a tensor differs; the message names the first one.
    """
    found, _ = read_header(path)
    if wrong := [key for key, one in tensors.items() if key not in found or _describe(found[key]) != one]:
        raise RuntimeError(f"verify: {path} lacks the tensor {wrong[0]}, or has another: {found.get(wrong[0])}")
    with open_regular(path) as file:
        for key in tensors:
            offset = found[key].begin
            for block in blocks(key):
                expected = block.values.contiguous()
                actual = empty_block(*expected.shape, dtype=expected.dtype)
                read_into(file, offset, actual)
                if tensor_bytes(actual) != tensor_bytes(expected):
                    raise RuntimeError(f"verify: {path} differs from what was written in the tensor {key}")
                offset += expected.nbytes
                advance(expected.nbytes)


def _describe(info: TensorInfo) -> Description:
    return info.dtype, info.shape, info.nbytes
