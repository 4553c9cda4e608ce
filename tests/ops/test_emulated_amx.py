"""The kernels for AMX, over tiles in plain C++ (tests/cpp/emulated_amx): what no other test runs on most machines.

They need AVX512-BF16 for everything else. The op tests run in a process that imports a package with these kernels; the
base product is PyTorch's, as on machines with AMX.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpp import amx_package
from support.processes import TESTS

from lora_ext import _load

pytestmark = [pytest.mark.cpu_only("is about CPU kernels"), pytest.mark.full]

HERE = Path(__file__).parent
# The only dtypes of which these kernels differ from those of AVX512-BF16.
BFLOAT16 = "(bfloat16-bfloat16 or bfloat16-float32)"
TESTS_OF_PAIRS = [
    "test_values.py::test_values_and_gradients",
    "test_values.py::test_ranks",
    "test_values.py::test_layers_together_have_the_bits_of_one_by_one",
    "test_grouped.py::test_rows_have_the_bits_of_lora_delta",
]
# Ops whose kernels are those of lora_linear and lora_shrink: test_layers_together_... compares their bits.
OTHERS = "(test_values_and_gradients and (delta or siblings or bottleneck))"


@pytest.fixture(scope="module")
def compiles():
    """Skips where the kernels cannot be compiled or run."""
    if "avx512_bf16" not in _load.available_cpu_isas():
        pytest.skip("this machine has no AVX512-BF16, which the kernels use next to the tiles")
    if (compiler := amx_package.compiler()) is None:
        pytest.skip("there is no g++ on PATH, nor a compiler in CXX")
    flags = ["-mavx512bf16", "-mavx512vbmi2", "-x", "c++", "-E", "-"]
    if subprocess.run([compiler, *flags], input="", capture_output=True, text=True).returncode != 0:
        pytest.skip(f"{compiler} does not know AVX512-BF16")


@pytest.fixture(scope="module")
def package(compiles, tmp_path_factory):
    """The folder to import lora_ext from."""
    folder = tmp_path_factory.mktemp("emulated_amx")
    amx_package.build(folder)
    return folder


def run(package: Path, *arguments: str) -> str:
    """Runs a Python that imports the package, and returns what it prints."""
    chosen = {"LORA_EXT_CPU_ISA": "avx512_bf16", "LORA_EXT_BASE_PRODUCT": "library"}
    environment = {**os.environ, **chosen, "PYTHONPATH": f"{package}{os.pathsep}{TESTS}"}
    result = subprocess.run([sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[:1000]
    return result.stdout


def test_ops(package):
    """One process, because imports take longer than most of these tests."""
    options = ["-x", "-q", "-k", f"{BFLOAT16} and not {OTHERS}", "--capture=sys"]  # shows what the tiles refuse
    options += [option for plugin in ("cacheprovider", "xdist") for option in ("-p", f"no:{plugin}")]
    run(package, "-m", "pytest", *options, *(f"{HERE / test}" for test in TESTS_OF_PAIRS))


COUNT = """
import ctypes, sys, torch
from lora_ext import _load
from support.op_table import OPS, results
product_count = ctypes.CDLL(_load.LIBRARY).lora_ext_tile_products
product_count.restype = ctypes.c_int64
dtypes = (torch.bfloat16, getattr(torch, sys.argv[1]))
for name, sample, leaves in (
    ("lora_linear", "(40, 384, 384, 16)", False),
    ("lora_linear", "(40, 384, 384, 16)", True),
    ("lora_linear", "(8, 512, 48, 16)", False),
    ("lora_grouped_", "panels and items", False),
    ("lora_grouped_", "panels and items", True),
):
    op, before = OPS[name], product_count()
    made = op.samples[sample](dtypes)
    results(op.run, made, op.leaves(made) if leaves else [])
    print(product_count() - before)
"""


def test_the_products_of_every_kernel_are_in_tiles(package):
    counts, of_wider_factors = (run(package, "-c", COUNT, dtype).split() for dtype in ("bfloat16", "float32"))
    assert of_wider_factors == counts
    forward, both, few_tokens, grouped_forward, grouped_both = map(int, counts)
    assert 0 < forward < both and 0 < grouped_forward < grouped_both and few_tokens > 0


@pytest.mark.usefixtures("compiles")
def test_the_tiles_multiply():
    subprocess.run([amx_package.tiles_tests()], check=True)


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("columns", "TDPBF16PS: the sum has other columns"),
        ("rows", "TDPBF16PS: the sum has other rows"),
        ("lanes", "TDPBF16PS: the left operand has other lanes"),
        ("same", "TDPBF16PS: the three tiles are not different"),
        ("large", "LDTILECFG: a tile is too large"),
        ("bytes", "LDTILECFG: a tile has rows without bytes"),
        ("palette", "LDTILECFG: there is no such palette"),
        ("unconfigured", "TILELOADD: this thread's tiles are not configured"),
        ("released", "TILELOADD: this thread's tiles are not configured"),
        ("thread", "TILEZERO: this thread's tiles are not configured"),
        ("shapeless", "TILEZERO: the tile has no rows"),
    ],
)
def test_a_mistake_ends_the_process(mistake, message):
    result = subprocess.run([amx_package.tiles_tests(), mistake], capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr
