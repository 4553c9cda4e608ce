"""Bugs planted in a small kernel: each must be found, and the report must name its kernel, block, thread and line."""

from __future__ import annotations

import ctypes

import pytest
import torch

from simt.driver import Report
from simt.mutate import MUTATIONS, SOURCE, Mutation, library

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

# Three blocks, the last one with missing rows; five tiles in a pipeline of three, the last one with missing columns;
# gaps between the rows of x.
ROWS, COLS, STRIDE = 70, 136, 144


def run(mutation: Mutation, schedule: int) -> tuple[list[Report], torch.Tensor, torch.Tensor]:
    """Returns the reports; the product and the number of positives; and their expected values."""
    mutants = library()
    mutants.reset(schedule)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, STRIDE, generator=generator).bfloat16()[:, :COLS]
    w = torch.randn(8, COLS, generator=generator).bfloat16()
    out = mutants.allocate(ROWS * 8 * 4, "out")
    positives = mutants.upload(torch.zeros(1, dtype=torch.int32), "positives")
    pointers = [
        ctypes.c_void_p(pointer) for pointer in (mutants.upload(x, "x"), mutants.upload(w, "w"), out, positives)
    ]
    getattr(mutants.c, f"run_{mutation.name}")(*pointers, ROWS, COLS, STRIDE)
    reports = mutants.reports()
    exact = x.double() @ w.double().T
    expected = torch.cat([exact.flatten(), (exact > 0).sum().view(1)])
    if reports:
        return reports, torch.empty(0), expected
    product = mutants.download(out, (ROWS * 8,), torch.float32, "out")
    count = mutants.download(positives, (1,), torch.int32, "positives")
    return reports, torch.cat([product.double(), count]), expected


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_the_original_is_right(schedule):
    reports, result, expected = run(MUTATIONS[0], schedule)
    assert not reports
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mutation", MUTATIONS[1:], ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_found(mutation):
    reports, _, _ = run(mutation, schedule=0)
    assert reports, "nothing was found"
    report = reports[0]
    assert report.kind == mutation.kind, report
    if mutation.kind not in ("host-access", "launch-limits"):  # the host causes those
        assert report.kernel == f"{mutation.name}::product_kernel({mutation.name}::ProductParams)", report
        assert (report.block, report.thread) == ((mutation.block, 0, 0), (mutation.thread, 0, 0)), report
    if mutation.at:
        assert report.file.endswith(f"/{mutation.name}/{SOURCE.name}"), report
        line = mutation.path.read_text().splitlines()[report.line - 1]
        assert mutation.at in line, f"{report}\nthe line reads {line}"


@pytest.mark.parametrize("mutation", MUTATIONS[1:], ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_found_in_any_order_of_threads(mutation):
    for schedule in (1, 2):
        reports, _, _ = run(mutation, schedule)
        assert reports, f"nothing was found in schedule {schedule}"
