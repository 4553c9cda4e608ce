"""Runs the fuzzers of everything that reads files, from fixed seeds; tests/fuzz/area_files.py states the rules."""

from __future__ import annotations

import pytest

from fuzz import campaign
from fuzz.areas import FIXED_CASES, OF_FILES

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]


@pytest.mark.parametrize("area", [area for area in OF_FILES if area in FIXED_CASES])
def test_nothing_is_found(area, fixed_cases):
    result = campaign.run(area, fixed_cases(area), processes=1)
    assert not result.found, "\n".join(found.text() for found in result.found.values())
    for function, counter in result.counts.items():  # valid files are read, too
        assert counter["compared"], f"{function}\n{result.table()}"
