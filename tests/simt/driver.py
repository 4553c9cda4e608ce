"""Loads a built library and gives access to its device memory and its reports."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import params
from .build import CACHE, ROOT, SIMT, build_library

FEW_SMS = 2
STAND_IN = ("tests/simt/standin/", "tests/simt/runtime/")


@dataclass(frozen=True)
class Report:
    """A problem and its place. `block` and `thread` are (x, y, z)."""

    kind: str
    kernel: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        kernel = re.sub(r"^void |lora_ext::cuda::|\(.*\)$", "", self.kernel) or "host code"
        where = f"block {self.block} thread {self.thread}".replace(" (", "(").replace(", ", ",")
        return f"[{self.kind}] {kernel} {where} at {self.file}:{self.line}: {self.text}"


class Launch(NamedTuple):
    kernel: str  # such as "shrink", of shrink_kernel
    blocks: int
    threads: int
    shared_bytes: int


def planned(plan: Any) -> list[Launch]:
    """Returns the launches of a plan of ``lora_ext._C``."""
    return [Launch(launch.kernel, launch.blocks, launch.threads, launch.shared_bytes) for launch in plan.launches]


def _lines(function: Callable[[int], bytes | None]) -> Iterator[list[str]]:
    """Returns the fields of each line that a function of runtime/api.cpp returns."""
    lines = itertools.takewhile(bool, map(function, itertools.count()))
    return (line.decode().split("\t") for line in lines)


class Library:
    """A built library. All runs share its device memory, so every run begins with `reset`."""

    sms = 132  # of the GPU for which the kernels plan: an H100

    def __init__(self, path: Path):
        self.path = path
        self.c = ctypes.CDLL(str(path))
        u64, pointer = ctypes.c_uint64, ctypes.c_void_p
        self.c.simt_reset.argtypes = [u64]
        self.c.simt_allocate.argtypes = [u64, u64, u64, ctypes.c_char_p]
        self.c.simt_allocate.restype = pointer
        self.c.simt_write.argtypes = self.c.simt_read.argtypes = [pointer, pointer, u64]
        self.c.simt_first_uninitialised.argtypes = [pointer, u64]
        self.c.simt_first_uninitialised.restype = ctypes.c_int64
        for lines in (self.c.simt_report, self.c.simt_launch):
            lines.argtypes, lines.restype = [u64], ctypes.c_char_p

    # --- runs -----------------------------------------------------------------------------------------------------

    def reset(self, schedule: int = 0) -> None:
        """Frees device memory and forgets reports. schedule: 0 runs threads in order, others shuffle them."""
        self.c.simt_reset(schedule)

    def allow_races(self) -> None:
        """Allows races until `reset`: for garbage input, with which a kernel only promises where it does not write."""
        self.c.simt_allow_races()

    def reports(self) -> list[Report]:
        found = []
        for kind, text, kernel, block, thread, place in _lines(self.c.simt_report):
            text = re.sub(r"\{pc:(\w+)\}", lambda m: "{}:{}".format(*self._place(int(m[1], 16))), text)
            at = (tuple(map(int, numbers.split())) for numbers in (block, thread))
            found.append(Report(kind, kernel, *at, *self._place(int(place)), text.replace(f"{ROOT}/", "")))
        return found

    def launches(self) -> list[Launch]:
        """Returns the launches since `reset`, in order."""
        lines = _lines(self.c.simt_launch)
        return [Launch(re.search(r"(\w+)_kernel\b", kernel)[1], *map(int, numbers)) for kernel, *numbers in lines]

    def check(self) -> None:
        """Raises AssertionError if the runs since `reset` had reports."""
        reports = self.reports()
        assert not reports, "\n".join(map(str, reports))

    @functools.cache  # noqa: B019  libraries live as long as the process
    def _place(self, offset: int) -> tuple[str, int]:
        """Returns file and line of the call before a return address: the innermost outside the stand-in."""
        command = ["addr2line", "-i", "-e", str(self.path), hex(max(offset - 1, 0))]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        places = [re.sub(r" \(discriminator.*", "", line).rpartition(":") for line in lines if ":" in line]
        places = [(str(Path(file).resolve()) if "?" not in file else file, line) for file, _, line in places]
        places = [(file.removeprefix(f"{ROOT}/"), int(line) if line.isdigit() else 0) for file, line in places]
        outside = [place for place in places if not place[0].startswith(STAND_IN)]
        return (outside or places)[0]

    # --- device memory ----------------------------------------------------------------------------------------------

    def allocate(self, num_bytes: int, name: str, alignment: int = 16, offset: int = 0) -> int | None:
        """Returns the address of a new buffer: an odd multiple of alignment, plus offset. Its contents are undefined.

        Returns null for 0 bytes, as torch does for an empty tensor.
        """
        if num_bytes == 0:
            return None
        return self.c.simt_allocate(num_bytes, alignment, offset, name.encode())

    def upload(self, tensor: Tensor | None, name: str) -> int | None:
        """Copies a matrix or vector whose last stride is 1. Gaps between its rows stay undefined.

        A view that begins inside its storage is misaligned on the device by the same number of bytes.
        """
        if tensor is None:
            return None
        size = tensor.element_size()
        rows = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor
        assert rows.dim() == 2 and (rows.shape[1] <= 1 or rows.stride(1) == 1), "want a matrix with unit column stride"
        row_bytes, pitch = rows.shape[1] * size, rows.stride(0) * size
        num_bytes = (rows.shape[0] - 1) * pitch + row_bytes if rows.numel() else 0
        address = self.allocate(num_bytes, name, offset=tensor.storage_offset() * size % 16)
        if pitch == row_bytes and num_bytes:
            self.c.simt_write(address, tensor.data_ptr(), num_bytes)
        elif num_bytes:
            for row in range(rows.shape[0]):
                self.c.simt_write(address + row * pitch, rows.data_ptr() + row * pitch, row_bytes)
        return address

    def download_rows(self, address: int, like: Tensor, name: str) -> Tensor:
        """Returns a matrix of the shape and strides of `like`. Raises if something was written between its rows."""
        size, (rows, columns) = like.element_size(), like.shape
        pitch, gap = like.stride(0) * size, max(like.stride(0) - columns, 0) * size
        tensor = torch.empty(rows, columns, dtype=like.dtype)
        for row in range(rows):
            tensor[row] = self.download(address + row * pitch, (columns,), like.dtype, f"{name} row {row}")
            for byte in range(columns * size, columns * size + gap if row + 1 < rows else 0):
                if self.c.simt_first_uninitialised(address + row * pitch + byte, 1) != 0:
                    raise AssertionError(f"{name}: something was written {byte} bytes after the start of row {row}")
        return tensor

    def download(self, address: int, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        """Returns a contiguous array. Raises if one of its bytes was never written."""
        tensor = torch.empty(shape, dtype=dtype)
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes:
            unwritten = self.c.simt_first_uninitialised(address, num_bytes)
            if unwritten >= 0:
                raise AssertionError(f"{name}: byte {unwritten} of {num_bytes} was never written")
            self.c.simt_read(tensor.data_ptr(), address, num_bytes)
        return tensor


def kernel_library(name: str, folder: Path = ROOT / "csrc/cuda", more: tuple[Path, ...] = ()) -> Library:
    """Builds the kernels of a folder. more: sources that are not kernels."""
    others = [
        SIMT / "entry.cpp",
        *sorted((ROOT / "csrc/cuda").glob("*.cpp")),
        params.layout_check(CACHE / "layout_check.cpp"),
        *more,
    ]
    return Library(build_library(name, sorted(folder.rglob("*.cu")), others))


@functools.cache
def kernels() -> Library:
    """Returns the kernels of csrc/cuda, built on first use."""
    return kernel_library("kernels")


@functools.cache
def few_blocks() -> Library:
    """Returns the kernels, planning for a GPU of few SMs.

    On a large GPU, a block has only one step at a test's sizes. With few blocks, loops and pipelines run several times.
    """
    library = Library(kernels().path)
    library.sms = FEW_SMS
    return library


@functools.cache
def library_of(name: str, *sources: Path) -> Library:
    """Builds a library of kernel sources that define C functions."""
    return Library(build_library(name, list(sources)))
