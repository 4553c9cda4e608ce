"""Bugs planted in the kernels of csrc/cuda: each must be found, and the report must name its kernel and line."""

from __future__ import annotations

import re

import pytest

from simt.build import ROOT
from simt.driver import SimtError
from simt.kernel_mutations import MUTATIONS, library, planted

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]


@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_found(mutation, schedule):
    with planted(mutation) as mutants, pytest.raises(SimtError) as raised:
        mutation.run(mutants, schedule)
    report, expected = raised.value.reports[0], mutation.report
    assert report.kind in expected.kinds, report
    assert re.search(rf"::{expected.kernel}[<(]", report.kernel), report
    path = f"csrc/cuda/{expected.path or mutation.path}"
    assert report.file.endswith(f"/{path}"), report
    line = (ROOT / path).read_text().splitlines()[report.line - 1]
    assert expected.at in line, f"{report}\nthe line reads {line}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_nothing_is_found_where_it_is_not_planted(mutation):
    mutation.run(library(), 0)
