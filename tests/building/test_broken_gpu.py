"""Tests support/broken_gpu.py with a GPU that is made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import timed_parts  # noqa: E402

pytestmark = [pytest.mark.cpu_only("pretends that there is a GPU"), pytest.mark.full]

TESTS = ROOT / "tests"
# The error of a stray access stays, that of another call is reported once.
CONFTEST = """
import torch
from support import broken_gpu

errors = {"once": 0, "stray": 0}

def synchronize():
    if errors["stray"] or errors["once"]:
        errors["once"] = 0
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

def pytest_configure(config):
    config.pluginmanager.register(broken_gpu)
"""
CASES = """
import conftest, pytest

@pytest.mark.parametrize("number", range(12))
def test_one(number):
    if number == 3:
        conftest.errors["once"] = 1
    if number == 5:
        conftest.errors["stray"] = 1
    assert number != 8
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_test_that_broke_the_gpu_fails(tmp_path, workers):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    command += ["-n", str(workers)] if workers else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert result.returncode == 1, said
    assert "test_one[5] broke the context of the GPU: CUDA error: an illegal memory access was encountered" in said
    failed = {test.rpartition("::")[2] for test in timed_parts.failed_tests(result.stdout)}
    if workers:
        assert failed == {"test_one[5]", "test_one[8]"} and "2 failed, 11 passed" in result.stdout, said
    else:
        assert failed == set() and "6 passed" in result.stdout and "with -n (pytest-xdist)" in said, said
