"""Tests that every kind of report is made: by a bug in a small kernel (product.cu), or by a wrong call of it.

How many faults in the real kernels are found is what kernel_mutants.py counts.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from torch import Tensor

from simt.build import SIMT
from simt.driver import Library, Report, library_of

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

SOURCE = SIMT / "product.cu"
BUGS = re.findall(r"\w+", re.search(r"enum Bug \{(.*?)\}", SOURCE.read_text(), re.DOTALL)[1])

# Block and thread that the report of a planted bug names when threads run in order.
PLANTED = {
    "race-shared": (0, 1),
    "race-global": (1, 0),
    "async-copy-not-waited": (0, 32),
    "async-copy-leak": (0, 32),
    "earlier-launch-not-waited": (0, 40),
    "uninitialised-read": (2, 32),
    "out-of-bounds-shared": (0, 0),
    "misaligned": (0, 0),
    "divergent-barrier": (1, 0),
    "divergent-warp": (2, 0),
    "undefined-behaviour": (0, 32),
    "shared-memory-layout": (0, 1),
}
WRONG_CALLS = ["out-of-bounds-global", "wild-access", "host-access", "launch-limits"]

# Three blocks, the last one with missing rows; five tiles in a pipeline of three, the last one with missing columns;
# gaps between the rows of x.
ROWS, COLS, STRIDE = 70, 136, 144


class ProductParams(ctypes.Structure):  # mirrors product.cu
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "w", "out", "positives")] + [
        (name, ctypes.c_int) for name in ("rows", "cols", "stride", "bug")
    ]


def run(kind: str, schedule: int) -> tuple[Library, dict[str, Tensor], Tensor]:
    """Runs the kernel with the bug or the wrong call of this kind. Returns its results and the exact product, too."""
    library = library_of("product", SOURCE)
    library.reset(schedule)
    x, w = torch.randn(ROWS, STRIDE).bfloat16()[:, :COLS], torch.randn(8, COLS).bfloat16()
    tensors = {"x": library.upload(x, "x"), "w": library.upload(w, "w")}
    tensors["out"] = library.allocate(torch.empty(ROWS, 8), "out")
    tensors["positives"] = library.upload(torch.zeros(1, dtype=torch.int32), "positives")
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    bug = BUGS.index(kind.replace("-", "_")) if kind not in WRONG_CALLS else 0
    p = ProductParams(*pointers, ROWS + (kind == "out-of-bounds-global"), COLS, STRIDE, bug)
    if kind == "wild-access":
        p.out = None
    address = ctypes.addressof(p)
    if kind == "host-access":
        address = library.allocate(torch.empty(ctypes.sizeof(p) // 8, dtype=torch.int64), "parameters").data_ptr()
    library.c.run_product(ctypes.c_void_p(address), 100 << 10 if kind == "launch-limits" else 0)
    return library, tensors, x.double() @ w.double().T


def first_report(kind: str, schedule: int) -> Report:
    reports = run(kind, schedule)[0].reports()
    assert reports, "nothing was found"
    return reports[0]


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_the_kernel_is_right_without_a_bug(schedule):
    library, tensors, exact = run("none", schedule)
    library.check()
    product = library.download(tensors["out"], "out")
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5)
    assert library.download(tensors["positives"], "positives") == (exact > 0).sum()


@pytest.mark.parametrize("kind", [*PLANTED, *WRONG_CALLS])
def test_a_report_names_the_line(kind):
    report = first_report(kind, schedule=0)
    assert report.kind == kind, report
    if kind in PLANTED:
        block, thread = PLANTED[kind]
        assert (report.block, report.thread) == ((block, 0, 0), (thread, 0, 0)), report
    if kind not in ("host-access", "launch-limits"):  # the host causes those
        assert "product_kernel" in report.kernel, report
    if kind != "launch-limits":
        assert report.file == f"tests/simt/{SOURCE.name}", report
        line = SOURCE.read_text().splitlines()[report.line - 1]
        assert kind in line.partition("//")[2], f"{report}\nthe line reads {line}"


@pytest.mark.parametrize("kind", PLANTED)
def test_a_bug_is_found_in_any_order_of_threads(kind):
    for schedule in (1, 2):
        first_report(kind, schedule)
