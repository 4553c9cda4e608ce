"""Loads a built library, gives access to its memory and reports, and runs the ops of lora_ext by its kernels."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support import layers
from support.op_table import OPS, Dtypes, Sample, assert_as_good_as_plain
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .build import ROOT, build_library

SMS, FEW_SMS = 132, 2  # of the GPU for which the kernels plan: an H100; one on which loops go round
_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)  # of the ops in standin/simt_bindings.h
ALIGNMENT = 16  # bytes that kernels may take for granted of a pointer without an offset
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

    def __init__(self, path: Path):
        self.path = path
        self.c = ctypes.CDLL(str(path))
        u64, pointer = ctypes.c_uint64, ctypes.c_void_p
        self.c.simt_reset.argtypes = [u64]
        self.c.simt_allocate.argtypes = [u64, u64, u64, ctypes.c_char_p]
        self.c.simt_allocate.restype = pointer
        self.c.simt_write.argtypes = [pointer, pointer, pointer, u64]
        self.c.simt_written.argtypes = [pointer, pointer, u64]
        for lines in (self.c.simt_report, self.c.simt_launch):
            lines.argtypes, lines.restype = [u64], ctypes.c_char_p

    # --- runs -----------------------------------------------------------------------------------------------------

    def reset(self, schedule: int = 0) -> None:
        """Frees device memory and forgets reports. schedule: 0 runs threads in order, others shuffle them."""
        self.c.simt_reset(schedule)

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

    def allocate(self, like: Tensor, name: str, alignment: int = ALIGNMENT) -> Tensor:
        """Returns a tensor in device memory with the shape, the strides and the misalignment of ``like``, undefined.

        An empty tensor has a null pointer, as torch gives it. alignment: in bytes; no buffer has a better one.
        """
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        offset, count = like.storage_offset() * like.element_size() % ALIGNMENT, len(_bytes_of_elements(like))
        address = self.c.simt_allocate(count, alignment, offset, name.encode())
        memory = torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=like.dtype)
        return memory.as_strided(like.shape, like.stride())

    def upload(self, tensor: Tensor, name: str) -> Tensor:
        """Copies a tensor to device memory; what lies between its elements stays undefined."""
        copy, is_element = self.allocate(tensor, name), _bytes_of_elements(tensor)
        if tensor.numel():
            self.c.simt_write(copy.data_ptr(), tensor.data_ptr(), is_element.data_ptr(), len(is_element))
        return copy

    def download(self, tensor: Tensor, name: str) -> Tensor:
        """Copies a tensor from device memory. Raises if an element was never written, or what lies between them was."""
        is_element = _bytes_of_elements(tensor)
        written = is_element.clone()  # elsewhere, what plain PyTorch has computed
        self.c.simt_written(written.data_ptr(), tensor.data_ptr(), len(written))
        if wrong := (written != is_element).nonzero().flatten().tolist():
            what = "was never written" if is_element[wrong[0]] else "lies between elements and was written"
            raise AssertionError(f"{name}: byte {wrong[0]} of {len(written)} {what}, and {len(wrong) - 1} more")
        return tensor.clone()


def _bytes_of_elements(tensor: Tensor) -> Tensor:
    """Returns for each byte from a tensor's first element to its last whether it is an element's."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.bool)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    is_element = torch.zeros(last + 1, dtype=torch.bool)
    is_element.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return is_element.repeat_interleave(tensor.element_size())


class Emulated(TorchDispatchMode):
    """Inside, the ops of lora_ext run as their CUDA bindings do: the bindings of csrc/bindings plan and allocate, and
    the emulator runs their kernels, in memory of its own.

    Every call also checks that nothing is reported, that every byte of its results was written, and nothing beside.

    Args:
        sms: of the GPU. On a large one, a block has only one step at a test's sizes; with FEW_SMS, loops and pipelines
            run several times.
        schedule: 0 runs threads in order, others shuffle them.
        races: whether they are reported.
        largest: bytes of an allocation; a larger one fails.

    Attributes:
        calls: the name and the launches of every op, in order.
    """

    def __init__(self, sms: int = SMS, schedule: int = 0, races: bool = True, largest: int = 2**60):
        super().__init__()
        self.library, self.schedule, self.races = kernels(), schedule, races
        self.device = ctypes.c_int64(sms), ctypes.c_int64(largest)
        self.calls: list[tuple[str, list[Launch]]] = []

    def __enter__(self) -> Emulated:
        layers.emulations += 1
        return super().__enter__()

    def __exit__(self, *error) -> None:
        layers.emulations -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace != "lora_ext":
            return op(*args, **kwargs or {})
        arguments = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | (kwargs or {})
        library = self.library
        library.reset(self.schedule)
        if not self.races:
            library.c.simt_allow_races()
        library.c.simt_set_device(*self.device)
        given = {
            name: pytree.tree_map_only(Tensor, lambda tensor, name=name: library.upload(tensor, name), value)
            for name, value in arguments.items()
        }
        results = op.redispatch(_DEVICE, **given)
        library.check()
        self.calls.append((op._opname, library.launches()))
        for argument in op._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed = zip(*map(pytree.tree_leaves, (arguments[argument.name], given[argument.name])), strict=True)
                for host, device in changed:
                    host.copy_(library.download(device, argument.name))
        return pytree.tree_map_only(Tensor, lambda tensor: library.download(tensor, f"a result of {op}"), results)


def check(
    name: str,
    make: Callable[[Dtypes], Sample],
    dtypes: Dtypes,
    dropout_p: float = 0.0,
    names: Sequence[str] | None = None,
    **gpu: Any,
) -> Emulated:
    """Compares an op of the table, and its backward, with plain PyTorch. Returns what ran it."""
    with Emulated(**gpu) as emulated:
        assert_as_good_as_plain(OPS[name], make, dtypes, dropout_p, names=names)
    return emulated


def run(name: str, sample: Sample, names: Sequence[str] | None = None, **gpu: Any) -> dict[str, Tensor]:
    with Emulated(**gpu):
        return OPS[name].results(sample, names)


def kernel_library(name: str, folder: Path = ROOT / "csrc/cuda", more: tuple[Path, ...] = ()) -> Library:
    """Builds the kernels of a folder, and the bindings that call them. more: sources that are not kernels."""
    others = [*sorted((ROOT / "csrc/cuda").glob("*.cpp")), *more]
    return Library(build_library(name, sorted(folder.rglob("*.cu")), others, bindings=True))


@functools.cache
def kernels() -> Library:
    """Returns the kernels of csrc/cuda, built on first use."""
    return kernel_library("kernels")


@functools.cache
def library_of(name: str, *sources: Path) -> Library:
    """Builds a library of kernel sources that define C functions."""
    return Library(build_library(name, list(sources)))
