"""Kills a process at each call that changes files, or makes the call fail, and checks the files afterwards.

A test runs a script of this directory (:func:`run_script`) in a process that loads ``interpose.c`` in front of libc.
The script forks for each try (tests/faults/tries.py), so that imports run once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_python

FAULTS = Path(__file__).resolve().parent
BUILD = FAULTS.parents[1] / "build" / "faults"


def library() -> Path:
    """Compiles ``interpose.c`` if necessary; returns the library."""
    source = FAULTS / "interpose.c"
    compiled = BUILD / f"interpose-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # test processes run in parallel
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            fresh = compiled.with_suffix(".new")
            subprocess.run(
                ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", fresh, source, "-ldl"], check=True
            )
            fresh.rename(compiled)
    return compiled


def run_script(name: str, *arguments: str | Path) -> Any:
    """Runs ``tests/faults/<name>.py`` with ``arguments``; returns the JSON in its last line.

    An assertion error of the script fails the test with its whole text.
    """
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        pytest.skip("interposing libc's calls needs Linux and a C compiler (cc)")
    result = run_python(
        "-m",
        f"faults.{name}",
        *arguments,
        LD_PRELOAD=str(library()),
        OMP_NUM_THREADS="1",  # a process that has started threads cannot fork
        PYTHONDONTWRITEBYTECODE="1",
    )
    said = f"{name} {' '.join(map(str, arguments))}: {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr}"
    assert result.returncode == 0, said
    return json.loads(result.stdout.splitlines()[-1])
