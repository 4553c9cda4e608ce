"""The kernels for AMX, over tiles in plain C++ (tests/cpp/emulated_amx): what no other test runs on most machines.

They need AVX512-BF16 for everything else. The op tests run in a process that imports a package with these kernels; the
base product is PyTorch's, as on machines with AMX.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp import amx_package
from cpp.tiles import Tiles
from support.processes import TESTS, run_python

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


# --- the tiles themselves ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles(compiles) -> Tiles:
    return Tiles(str(amx_package.tiles()))


def load(tiles: Tiles, *numbers: torch.Tensor) -> None:
    for tile, rows in enumerate(numbers):
        tiles.load(tile, rows.data_ptr(), rows.stride(0) * rows.itemsize)


def sums_of(tiles: Tiles, to: torch.Tensor) -> torch.Tensor:
    tiles.store(0, to.data_ptr(), to.stride(0) * to.itemsize)
    return to


@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("pairs", [1, 8, 16])
@pytest.mark.parametrize("columns", [1, 5, 16])
def test_the_tiles_multiply(tiles, rows, pairs, columns):
    """Rows are further apart than they are long; what is beyond a shape is not written."""
    left, right, before = torch.randn(16, 80).bfloat16(), torch.randn(16, 80).bfloat16(), torch.randn(16, 40)
    tiles.configure((rows, 4 * columns), (rows, 4 * pairs), (pairs, 4 * columns))
    load(tiles, before, left, right)
    tiles.multiply(0, 1, 2)
    found = sums_of(tiles, before.clone())
    matrix = right[:pairs, : 2 * columns].double().view(pairs, columns, 2).mT.reshape(2 * pairs, columns)
    exact = before[:rows, :columns] + left[:rows, : 2 * pairs].double() @ matrix
    torch.testing.assert_close(found[:rows, :columns].double(), exact, rtol=0, atol=1e-5)
    found[:rows, :columns] = before[:rows, :columns]
    assert torch.equal(found, before)


@pytest.mark.parametrize("sum_, left", [(2.0**-149, [0.0, 0.0]), (0.0, [2.0**-133, 0.0]), (0.0, [0.0, 2.0**-133])])
def test_subnormal_numbers_are_zero(tiles, sum_, left):
    tiles.configure(*[(1, 4)] * 3)
    load(tiles, torch.tensor([[sum_]]), torch.tensor([left]).bfloat16(), torch.ones(1, 2).bfloat16())
    tiles.multiply(0, 1, 2)
    assert sums_of(tiles, torch.ones(1, 1)) == 0.0


@pytest.mark.parametrize("clear", [lambda tiles: tiles.zero(0), lambda tiles: tiles.configure((1, 4))])
def test_tiles_are_cleared(tiles, clear):
    tiles.configure((1, 4))
    load(tiles, torch.ones(1, 1))
    clear(tiles)
    assert sums_of(tiles, torch.ones(1, 1)) == 0.0


WHOLE = (16, 64)
MISTAKES = {
    "TDPBF16PS: the sum has other columns": f"t.configure((16, 60), {WHOLE}, {WHOLE}); t.multiply(0, 1, 2)",
    "TDPBF16PS: the sum has other rows": f"t.configure({WHOLE}, (15, 64), {WHOLE}); t.multiply(0, 1, 2)",
    "TDPBF16PS: the left operand has other lanes": f"t.configure({WHOLE}, {WHOLE}, (15, 64)); t.multiply(0, 1, 2)",
    "TDPBF16PS: the three tiles are not different": f"t.configure({WHOLE}, {WHOLE}); t.multiply(0, 1, 1)",
    "LDTILECFG: a tile is too large": "t.configure((17, 64))",
    "LDTILECFG: a tile has rows without bytes": "t.configure((16, 0))",
    "LDTILECFG: there is no such palette": f"t.configure({WHOLE}, palette=2)",
    "TILELOADD: this thread's tiles are not configured": "t.load(1, bytes(1024), 64)",
    "TILESTORED: this thread's tiles are not configured": f"t.configure({WHOLE}); t.release(); t.store(0, None, 64)",
    "TILEZERO: this thread's tiles are not configured": (
        f"import threading; t.configure({WHOLE}); threading.Thread(target=t.zero, args=[0]).start()"
    ),
    "TILEZERO: the tile has no rows": f"t.configure({WHOLE}); t.zero(4)",
}


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_ends_the_process(message):
    program = f"import sys; from cpp.tiles import Tiles; t = Tiles(sys.argv[1]); {MISTAKES[message]}"
    done = run_python("-c", program, amx_package.tiles())
    assert done.returncode == -signal.SIGABRT and message in done.stderr
