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


def collect(*options: str) -> subprocess.CompletedProcess[str]:
    """Collects tests with every optional package hidden."""
    command = [sys.executable, "-m", "pytest", "-p", "support.gpu_machine", "-p", "no:cacheprovider", "-q"]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *options], cwd=TESTS.parent, env=environment, capture_output=True, text=True)


def test_the_whole_suite_is_collected_without_optional_packages():
    result = collect("--collect-only")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) tests collected", result.stdout)[1]) > 9000
    for path in TESTS.glob("ops/test_*.py"):  # these run on the GPU: none is skipped as a whole
        assert f"{path.relative_to(TESTS.parent)}::" in result.stdout, path.name


def test_what_is_hidden(tmp_path):
    """A test that imports an optional package fails, so the plugin hides it; what a GPU machine has is found."""
    source = """
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
    (tmp_path / "test_hidden.py").write_text(source)
    result = collect(str(tmp_path / "test_hidden.py"))
    assert result.returncode == 0 and "8 passed" in result.stdout, result.stdout
