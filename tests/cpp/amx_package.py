"""Builds lora_ext with the AMX kernels over emulated tiles (emulated_amx/), as the kernels of every machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from support import extension
from support.object_cache import ROOT, ObjectCache

SOURCES = Path(__file__).parent / "emulated_amx"
_CACHE = ObjectCache(ROOT / "build" / "emulated_amx")
_KERNELS = "csrc/cpu/isa_"
# Later flags win. The kernels take most of the time, compiled and run; calls check their arguments in no time.
_OPTIMIZED = {"kernels.cpp": ["-O1"], "tiles.cpp": ["-O3", "-mavx512f", "-mfma"]}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> None:
    """Makes ``folder`` one to import lora_ext from. Each process of the tests has its own."""
    described = extension.describe()
    flags = [*described.flags, "-fPIC", "-O0", "-w", f"-I{ROOT / 'csrc'}"]
    jobs = [(SOURCES / name, [compiler(), *flags, *more]) for name, more in _OPTIMIZED.items()]
    jobs += [(ROOT / name, [compiler(), *flags]) for name in described.sources if not name.startswith(_KERNELS)]
    with _CACHE.locked("build"):
        objects = _CACHE.compile_all(jobs)
        # Without the list of exports: a test calls a function of tiles.h.
        libraries = [flag for flag in described.link_flags if "--version-script" not in flag]
        library = _CACHE.link("liblora_ext", objects, described.linker(compiler()), libraries)
        _CACHE.remove_old()
        extension.write_package(folder, library)


def tiles() -> Path:
    """Builds a library of the tiles alone."""
    with _CACHE.locked("tiles"):
        command = [compiler(), "-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        return _CACHE.link("tiles", [_CACHE.compile(SOURCES / "tiles.cpp", command)], [compiler(), "-shared"])
