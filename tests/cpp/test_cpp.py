"""Builds the C++ tests of the torch-free kernels with CMake and runs them with ctest."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu_only("tests the CPU kernels"), pytest.mark.full]

ROOT = Path(__file__).parents[2]


def test_cmake_builds_the_kernels_and_their_tests_pass(tmp_path):
    cmake, ctest = shutil.which("cmake"), shutil.which("ctest")
    assert cmake and ctest, "cmake is a dependency of the test extra: pip install 'lora_ext[test]'"
    for command in (
        [
            cmake,
            "-S",
            ROOT,
            "-B",
            tmp_path,
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        ],  # half the time of -O3, which setup.py tests
        [cmake, "--build", tmp_path, "--parallel", "2"],
        [ctest, "--test-dir", tmp_path, "--output-on-failure"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert (tmp_path / "compile_commands.json").exists()
