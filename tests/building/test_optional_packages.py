"""Tests that the suite is collected on a machine that lacks optional packages, such as the first GPU machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]

TESTS = Path(__file__).parents[1]


HIDDEN = """
import importlib.util, peft, pytest, regex, safetensors, transformers, xdist

@pytest.mark.parametrize("name", ["bitsandbytes", "diffusers", "gguf", "hypothesis", "loralib", "matplotlib", "trl"])
def test_hidden(name):
    assert importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(name)

def test_transformers_sees_none():
    assert not transformers.utils.is_bitsandbytes_available()
"""
COUNTING = """
def pytest_deselected(items):
    print("of the suite:", *(item.path.name for item in items))
"""


def test_the_whole_suite_is_collected_without_optional_packages(tmp_path):
    """One process collects the suite and runs ``HIDDEN``: what a GPU machine lacks is not found, the rest is."""
    (tmp_path / "test_hidden.py").write_text(HIDDEN)
    (tmp_path / "conftest.py").write_text(COUNTING)
    command = [sys.executable, "-m", "pytest", "-p", "support.gpu_machine", "-p", "no:cacheprovider", "-q"]
    command += [tmp_path, TESTS, "-k", "test_hidden.py"]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "8 passed" in result.stdout, result.stdout[-4000:] + result.stderr[-2000:]
    names = {name for line in re.findall(r"of the suite: (.*)", result.stdout) for name in line.split()}
    # These run on the GPU: none is skipped as a whole.
    assert {path.name for path in TESTS.glob("ops/test_*.py")} <= names
