"""One file of a checkpoint: written, or compared, a block of rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from ..safetensors_format import encode_header, read_header
from .checkpoint_files import read_into, tensor_bytes
from .merging import Block

__all__ = ["Description", "compare_file", "write_bytes", "write_file"]

Description: TypeAlias = tuple[str, tuple[int, ...], int]
"""Of a tensor: its dtype by the name in the format, shape, bytes."""


def write_file(
    path: Path,
    tensors: Mapping[str, Description],
    metadata: Mapping[str, str],
    blocks: Callable[[str], Iterator[Block]],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes a safetensors file. ``blocks(key)`` gives each tensor's values in order; they are asked for once."""
    header, places = encode_header(tensors, metadata)
    with open(path, "wb", buffering=0) as file:
        write_bytes(file.fileno(), 0, memoryview(header))
        for key, info in places.items():
            offset = info.begin
            for block in blocks(key):
                values = block.values.contiguous()
                write_bytes(file.fileno(), offset, tensor_bytes(values))
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
    """Reads a file back and compares it, bit by bit, with what it should hold.

    Raises:
        RuntimeError: naming the first tensor that differs.
    """
    found, _ = read_header(path)
    if wrong := [key for key, one in tensors.items() if key not in found or _describe(found[key]) != one]:
        raise RuntimeError(f"verify: {path} has not the tensor {wrong[0]} as it should be: {found.get(wrong[0])}")
    with open(path, "rb", buffering=0) as file:
        for key in tensors:
            offset = found[key].begin
            for block in blocks(key):
                expected = block.values.contiguous()
                actual = torch.empty_like(expected)
                read_into(file.fileno(), offset, actual)
                if tensor_bytes(actual) != tensor_bytes(expected):
                    raise RuntimeError(f"verify: {path} differs from what was written in the tensor {key}")
                offset += expected.nbytes
                advance(expected.nbytes)


def write_bytes(fd: int, offset: int, data: memoryview) -> None:
    """All of ``data``, at ``offset`` of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _describe(info) -> Description:
    return info.dtype, info.shape, info.nbytes
