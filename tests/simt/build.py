"""Compiles kernels, stand-in and runtime into a shared library. Objects are cached by their sources' contents."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from support import extension
from support.object_cache import ROOT, ObjectCache

from . import cuda_headers

SIMT = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "simt"
_OBJECTS = ObjectCache(CACHE)
locked = _OBJECTS.locked

COMMON_FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
RUNTIME_FLAGS = [*COMMON_FLAGS, "-O2"]
BINDING_FLAGS = ["-g1", "-fPIC", "-O1", "-include", "simt_bindings.h"]  # after those of setup.py
KERNEL_FLAGS = [
    *COMMON_FLAGS,
    "-O1",
    "-x",
    "c++",
    "-include",
    "simt_builtins.h",
    # Calls runtime/hooks.cpp at every load and store, and at undefined behaviour.
    "-fsanitize=thread,alignment,bounds-strict,shift,integer-divide-by-zero",
]


def _compiler() -> str:
    """Returns the path of g++: clang instruments code differently."""
    if compiler := shutil.which("g++"):
        return compiler
    raise RuntimeError("tests/simt needs g++ (11 or newer) on PATH")


def command(flags: list[str]) -> list[str]:
    headers = [f"-isystem{path}" for path in cuda_headers.find()]
    return [_compiler(), *flags, f"-I{SIMT / 'standin'}", f"-I{ROOT}", *headers]


def build_library(name: str, kernels: list[Path], others: Sequence[Path] = (), bindings: bool = False) -> Path:
    """Builds a shared library of the runtime, of kernels (instrumented) and of ``others`` (not instrumented).

    bindings: whether those of csrc/bindings belong to it.
    """
    with locked(name):
        plain = [*sorted((SIMT / "runtime").glob("*.cpp")), *others]
        jobs = [(path, command(KERNEL_FLAGS)) for path in kernels] + [(path, command(RUNTIME_FLAGS)) for path in plain]
        libraries = ["-ldl"]
        if bindings:
            described = extension.describe()
            flags = [*described.flags, *BINDING_FLAGS]
            sources = [SIMT / "bindings.cpp", *sorted((ROOT / "csrc/bindings").glob("cuda_*.cpp"))]
            jobs += [(path, command(flags)) for path in sources]
            libraries += [*(f"-L{path}" for path in described.library_dirs), "-ltorch_cpu"]
        library = _OBJECTS.link(name, _OBJECTS.compile_all(jobs), [_compiler(), "-shared", "-Wl,-z,defs"], libraries)
        _OBJECTS.remove_old()
        return library
