"""Compiles kernels, stand-in and runtime into a shared library. Objects are kept and found by their contents."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cuda_headers

SIMT = Path(__file__).resolve().parent
ROOT = SIMT.parent.parent
CACHE = ROOT / "build" / "simt"
MAX_KEPT = 400  # objects; the oldest go first

COMMON_FLAGS = ["-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
RUNTIME_FLAGS = [*COMMON_FLAGS, "-O2"]
KERNEL_FLAGS = [
    *COMMON_FLAGS,
    "-O1",
    "-x",
    "c++",
    "-include",
    "simt_builtins.h",
    # Calls into runtime/hooks.cpp: at every load and store, and where behaviour is undefined.
    "-fsanitize=thread,alignment,bounds-strict,shift,integer-divide-by-zero",
]


def _compiler() -> str:
    """g++: clang instruments otherwise."""
    if compiler := shutil.which("g++"):
        return compiler
    raise RuntimeError("tests/simt needs g++ (11 or newer) on PATH")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:6000]}")


def _key(command: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for path in files:
        digest.update(path.read_bytes() if path.exists() else b"\0missing")
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process builds, the others wait for it: test processes run side by side."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(source: Path, flags: list[str]) -> Path:
    """The object of a source, compiled unless one of the same command, source and headers is there."""
    command = [
        _compiler(),
        *flags,
        f"-I{SIMT / 'standin'}",
        f"-I{ROOT}",
        *(f"-isystem{path}" for path in cuda_headers.find()),
    ]
    name = f"{source.stem}-{_key([*command, str(source)], [])[:8]}"
    dependencies = CACHE / f"{name}.d"  # what the last compilation read
    if dependencies.exists():
        files = [Path(word) for word in dependencies.read_text().replace("\\\n", " ").split()[1:]]
        cached = CACHE / f"{name}-{_key(command, files)}.o"
        if cached.exists():
            cached.touch()
            return cached
    fresh = CACHE / f"{name}-{os.getpid()}.o"
    _run([*command, "-MMD", "-MF", str(dependencies), "-c", str(source), "-o", str(fresh)])
    files = [Path(word) for word in dependencies.read_text().replace("\\\n", " ").split()[1:]]
    return fresh.rename(CACHE / f"{name}-{_key(command, files)}.o")


def _remove_old(suffix: str) -> None:
    kept = sorted(CACHE.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[MAX_KEPT:]:
        path.unlink(missing_ok=True)


def build_library(name: str, kernels: list[Path], others: list[Path] = ()) -> Path:
    """A shared library of the runtime, of kernel sources (instrumented) and of `others` (not)."""
    with locked(name):
        jobs = [(path, RUNTIME_FLAGS) for path in [*sorted((SIMT / "runtime").glob("*.cpp")), *others]]
        jobs = [(path, KERNEL_FLAGS) for path in kernels] + jobs
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            objects = list(pool.map(lambda job: _compile(*job), jobs))
        library = CACHE / f"{name}-{_key([], objects)}.so"
        if not library.exists():
            fresh = library.with_suffix(f".{os.getpid()}")
            _run([_compiler(), "-shared", "-Wl,-z,defs", *map(str, objects), "-ldl", "-o", str(fresh)])
            fresh.rename(library)
        library.touch()
        _remove_old(".o")
        _remove_old(".so")
        return library
