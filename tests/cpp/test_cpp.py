"""Builds the C++ tests of the torch-free kernels with CMake, what has changed since the last time, and runs them."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu_only("tests the CPU kernels"), pytest.mark.full]

ROOT = Path(__file__).parents[2]


def test_cmake_builds_the_kernels_and_their_tests_pass():
    cmake, ctest = shutil.which("cmake"), shutil.which("ctest")
    assert cmake and ctest, "cmake is a dependency of the test extra: pip install 'lora_ext[test]'"
    folder = ROOT / "build" / "cpp"
    for command in (
        [cmake, "-S", ROOT, "-B", folder, "-DCMAKE_CXX_FLAGS_RELEASE=-O0"],  # a quarter of the time of -O1
        [cmake, "--build", folder, "--parallel", "2"],
        [ctest, "--test-dir", folder, "--output-on-failure"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert (folder / "compile_commands.json").exists()
