"""The compiled library as setup.py describes it, and copies of the package with another build of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.object_cache import ROOT


@dataclass(frozen=True)
class Extension:
    """setup.py's description of liblora_ext.so."""

    sources: list[str]
    flags: list[str]
    library_dirs: list[str]
    link_flags: list[str]

    def linker(self, compiler: str, *flags: str) -> list[str]:
        """Returns the command that links objects, without ``link_flags``, which come after the objects."""
        paths = [flag for path in self.library_dirs for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        return [compiler, "-shared", *flags, *paths]


_DESCRIBE = """
import json, setuptools
from distutils.core import run_setup
extensions = {extension.name: extension for extension in run_setup("setup.py", ["-q"], "init").ext_modules}
e = extensions["lora_ext.liblora_ext"]
print(json.dumps([e.sources, e.extra_compile_args["cxx"], e.library_dirs, e.extra_link_args]))
"""


@functools.cache
def describe() -> Extension:
    command = [sys.executable, "-c", _DESCRIBE]
    environment = {**os.environ, "LORA_EXT_CUDA": "0"}
    says = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return Extension(*json.loads(says.stdout.splitlines()[-1]))


def write_package(folder: Path, library: Path) -> None:
    """Makes ``folder`` one to import lora_ext from, with ``library`` as its liblora_ext.so."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "lib*.so")
    shutil.copytree(ROOT / "lora_ext", folder / "lora_ext", ignore=ignored)
    shutil.copy(library, folder / "lora_ext" / "liblora_ext.so")
