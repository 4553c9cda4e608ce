"""Builds the package, the C++ tests and the library with planted bugs for a sanitizer.

The flags are setup.py's, followed by the sanitizer's. Nothing is written to lora_ext: a copy of the package in
build/sanitize/<sanitizer>/package is imported.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.object_cache import ROOT, ObjectCache

from .planted import SOURCE, PlantedBug
from .sanitizers import Sanitizer, compiler

FOLDER = ROOT / "build" / "sanitize"
PACKAGE = ROOT / "lora_ext"
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
        sources = _extension().sources
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
    def cpp_tests(self) -> Path:
        """The program of tests/cpp, linked with the library's torch-free objects."""
        sources = [ROOT / "tests/cpp" / name for name in ("kernel_tests.cpp", "conversion_tests.cpp")]
        kernels = [path for name, path in self.objects.items() if name.startswith("csrc/cpu/")]
        with self.cache.locked("cpp"):
            command = [compiler(), "-std=c++20", *_FLAGS, *self.sanitizer.flags, f"-I{ROOT / 'csrc'}"]
            tests = self.cache.compile_all([(source, command) for source in sources])
            link = [compiler(), *self.sanitizer.flags, "-pthread"]
            return self.cache.link("kernel_tests", [*tests, *kernels], link, suffix="")

    @functools.cached_property
    def openmp(self) -> Path:
        """The compiled openmp.c, which tells ThreadSanitizer about OpenMP."""
        command = [compiler(), "-x", "c", "-O1", "-Wall", "-Wextra", "-fPIC"]
        with self.cache.locked("openmp"):
            made = self.cache.compile(Path(__file__).with_name("openmp.c"), command)
            return self.cache.link("openmp", [made], [compiler(), "-shared"], ["-ldl"])

    def _command(self, root: Path) -> list[str]:
        flags = [*_extension().flags, *_FLAGS, f"-ffile-prefix-map={root}/="]
        return [compiler(), *flags, *self.sanitizer.flags]

    def _package(self, name: str, objects: dict[str, Path]) -> Path:
        extension = _extension()
        link = [compiler(), "-shared", *self.sanitizer.flags, *(f"-L{path}" for path in extension.library_dirs)]
        link += [f"-Wl,-rpath,{path}" for path in extension.library_dirs]
        with self.cache.locked("objects"):
            library = self.cache.link(name, list(objects.values()), link, extension.link_flags)
            self.cache.remove_old()
        folder = self.folder / name
        with self.cache.locked(name):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(PACKAGE, folder / "lora_ext", ignore=shutil.ignore_patterns("__pycache__", "lib*.so"))
            shutil.copy(library, folder / "lora_ext" / "liblora_ext.so")
        return folder


@dataclass(frozen=True)
class Extension:
    """setup.py's description of liblora_ext.so."""

    sources: list[str]
    flags: list[str]
    library_dirs: list[str]
    link_flags: list[str]


_DESCRIBE = """
import json, setuptools
from distutils.core import run_setup
extensions = {extension.name: extension for extension in run_setup("setup.py", ["-q"], "init").ext_modules}
e = extensions["lora_ext.liblora_ext"]
print(json.dumps([e.sources, e.extra_compile_args["cxx"], e.library_dirs, e.extra_link_args]))
"""


@functools.cache
def _extension() -> Extension:
    command = [sys.executable, "-c", _DESCRIBE]
    environment = {**os.environ, "LORA_EXT_CUDA": "0"}
    says = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return Extension(*json.loads(says.stdout.splitlines()[-1]))
