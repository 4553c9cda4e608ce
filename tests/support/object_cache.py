"""Caches compiled objects by their inputs: the command, the source and every header that it includes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_KEPT = 400  # objects; the oldest are removed first


class ObjectCache:
    """The objects and libraries of one folder. Several processes may use it at once."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Holds a lock, so that one process builds and other test processes wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def compile_all(self, jobs: Sequence[tuple[Path, list[str]]]) -> list[Path]:
        """Compiles ``(source, command)`` pairs; returns the objects in their order."""
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            return list(pool.map(lambda job: self.compile(*job), jobs))

    def compile(self, source: Path, command: list[str]) -> Path:
        """Compiles a source unless an object of the same command, source and headers exists; returns the object."""
        name = f"{source.stem}-{_key([*command, str(source)], [])[:8]}"
        dependencies = self.folder / f"{name}.d"  # the files that the last compilation read
        if dependencies.exists():
            cached = self.folder / f"{name}-{_key(command, _files_of(dependencies))}.o"
            if cached.exists():
                cached.touch()
                return cached
        fresh = self.folder / f"{name}-{os.getpid()}.o"
        run_compiler([*command, "-MMD", "-MF", str(dependencies), "-c", str(source), "-o", str(fresh)])
        return fresh.rename(self.folder / f"{name}-{_key(command, _files_of(dependencies))}.o")

    def link(
        self, name: str, objects: list[Path], command: list[str], libraries: Sequence[str] = (), suffix: str = ".so"
    ) -> Path:
        """Links the objects with ``command``; returns the file, whose name starts with ``name``."""
        output = self.folder / f"{name}-{_key([*command, *libraries], objects)}{suffix}"
        if not output.exists():
            fresh = output.with_suffix(f".{os.getpid()}")
            run_compiler([*command, *map(str, objects), *libraries, "-o", str(fresh)])
            fresh.rename(output)
        output.touch()
        return output

    def remove_old(self) -> None:
        for suffix in (".o", ".so"):
            kept = sorted(self.folder.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in kept[MAX_KEPT:]:
                path.unlink(missing_ok=True)


def run_compiler(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:6000]}")


def _files_of(dependencies: Path) -> list[Path]:
    return [Path(word) for word in dependencies.read_text().replace("\\\n", " ").split()[1:]]


def _key(command: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for path in files:
        digest.update(path.read_bytes() if path.exists() else b"\0missing")
    return digest.hexdigest()[:32]
