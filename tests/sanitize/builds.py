"""Builds the package and the library with planted bugs for a sanitizer.

The flags are setup.py's, followed by the sanitizer's. Nothing is written to lora_ext: a copy of the package in
build/sanitize/<sanitizer>/package is imported.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from support import extension
from support.object_cache import ROOT, ObjectCache

from .planted import SOURCE, PlantedBug
from .sanitizers import Sanitizer, compiler

FOLDER = ROOT / "build" / "sanitize"
# Later flags win. Reports need only -g1, and -O3 takes twice the time to compile.
_FLAGS = ["-fPIC", "-O1", "-g1", "-fno-omit-frame-pointer", "-w"]


class Build:
    """The builds of one sanitizer, made on first use and cached by their contents."""

    def __init__(self, sanitizer: Sanitizer):
        self.sanitizer = sanitizer
        self.folder = FOLDER / sanitizer.name
        self.cache = ObjectCache(self.folder / "objects")
        sanitizer.runtime_path()  # raises if it is missing

    @functools.cached_property
    def objects(self) -> dict[str, Path]:
        """The library's objects by source path."""
        sources = extension.describe().sources
        with self.cache.locked("objects"):
            made = self.cache.compile_all([(ROOT / source, self._command(ROOT)) for source in sources])
        return dict(zip(sources, made, strict=True))

    @functools.cached_property
    def package(self) -> Path:
        """The folder to import lora_ext from."""
        return self._package("package", self.objects)

    def planted_package(self, bug: PlantedBug) -> Path:
        """Builds :attr:`package` with a bug in the library."""
        folder = self.folder / "planted-sources"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cuda"))
        path = folder / bug.path
        path.write_text(bug.applied(path.read_text()))
        with self.cache.locked("objects"):
            made = self.cache.compile(folder / SOURCE, self._command(folder))
        return self._package("planted", {**self.objects, SOURCE: made})

    @functools.cached_property
    def openmp(self) -> Path:
        """The compiled openmp.c, which tells ThreadSanitizer about OpenMP."""
        command = [compiler(), "-x", "c", "-O1", "-Wall", "-Wextra", "-fPIC"]
        with self.cache.locked("openmp"):
            made = self.cache.compile(Path(__file__).with_name("openmp.c"), command)
            return self.cache.link("openmp", [made], [compiler(), "-shared"], ["-ldl"])

    def _command(self, root: Path) -> list[str]:
        flags = [*extension.describe().flags, *_FLAGS, f"-ffile-prefix-map={root}/="]
        return [compiler(), *flags, *self.sanitizer.flags]

    def _package(self, name: str, objects: dict[str, Path]) -> Path:
        described = extension.describe()
        link = described.linker(compiler(), *self.sanitizer.flags)
        with self.cache.locked("objects"):
            library = self.cache.link(name, list(objects.values()), link, described.link_flags)
            self.cache.remove_old()
        folder = self.folder / name
        with self.cache.locked(name):
            extension.write_package(folder, library)
        return folder
