"""Processes of this Python that import what this process imports, the folders of tests too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def environment(**variables: str) -> dict[str, str]:
    """Makes the environment of a process, with ``variables`` over this process's."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]), **variables}


def run_python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python to its end; whether it may fail is the caller's business."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
