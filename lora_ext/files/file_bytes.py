"""Transfers bytes between files and tensors, and detects changed files."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def empty_block(*shape: int, dtype: torch.dtype) -> Tensor:
    """Makes a CPU tensor of zeros that leaves the process's memory when it is freed.

    The C library keeps freed blocks of up to 32 MB for later, in pieces that the next block may not fit into.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def read_into(file: FileIO, offset: int, tensor: Tensor) -> None:
    """Fills a contiguous CPU tensor with the bytes at ``offset`` of an open file.

    Raises:
        OSError: the read failed; the error has the file's name.
        ValueError: the file became shorter.
    """
    if tensor.nbytes == 0:
        return
    view, done = tensor_bytes(tensor), 0
    while done < len(view):
        try:
            count = os.preadv(file.fileno(), [view[done:]], offset + done)
        except OSError as error:
            _name_error(error, file)
            raise
        if count == 0:
            raise ValueError(f"{file.name} became shorter while it was read")
        done += count


def write_bytes(file: FileIO, offset: int, data: memoryview) -> None:
    """Writes all of ``data`` at ``offset`` of an open file. An OSError has the file's name."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(file.fileno(), data[done:], offset + done)
        except OSError as error:
            _name_error(error, file)
            raise


def file_state(path: Path | int) -> tuple[int, ...] | None:
    """Identifies a version of a file or descriptor: differs after it is written or replaced. None: no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(states: Mapping[Path, tuple[int, ...] | None], caller: str) -> None:
    """Raises ValueError if the :func:`file_state` of a file differs from ``states``."""
    for path, state in states.items():
        if file_state(path) != state:
            raise ValueError(f"{caller}: {path} was changed while it was read; the result was discarded, try again")


def fingerprint(files: Iterable[Path], contents: bool) -> list[list[Any]]:
    """Identifies ``files`` across runs, as JSON can hold it: for each file its path with its size and time, or, with
    ``contents``, with the SHA-256 of its bytes."""
    return [[str(file), *(_content_digest(file) if contents else _size_and_time(file))] for file in files]


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _content_digest(file: Path) -> tuple[str]:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return (digest.hexdigest(),)


def _name_error(error: OSError, file: FileIO) -> None:
    """Adds the file's name to a system error; none if the file was opened by number."""
    error.filename = None if isinstance(file.name, int) else str(file.name)
