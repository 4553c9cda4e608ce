"""Tests tests/sanitize without running sanitizers; `make asan`, `make ubsan` and `make tsan` run them."""

from __future__ import annotations

import pytest

from sanitize.builds import ROOT
from sanitize.planted import PLANTED
from sanitize.sanitizers import SANITIZERS

pytestmark = [pytest.mark.cpu_only("is about the compiler"), pytest.mark.full]


@pytest.mark.parametrize("name", SANITIZERS)
def test_its_planted_bug_fits_the_sources(name):
    bug = PLANTED[name]
    assert bug.new in bug.applied((ROOT / bug.path).read_text())
    with pytest.raises(ValueError, match=r"has the text to replace 0 times, want once"):
        bug.applied("nothing")
