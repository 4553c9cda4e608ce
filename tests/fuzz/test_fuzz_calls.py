"""Runs the fuzzers of everything public that takes plain values or models, from fixed seeds."""

from __future__ import annotations

import pytest

from fuzz import campaign
from fuzz.areas import FIXED_CASES

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]


@pytest.mark.parametrize("area", [area for area in ("values", "models") if area in FIXED_CASES])
def test_nothing_is_found(area, fixed_cases):
    result = campaign.run(area, fixed_cases(area), processes=1)
    assert not result.found, "\n".join(found.text() for found in result.found.values())
    taken = sum(counter["compared"] + counter["accepted"] for counter in result.counts.values())
    assert taken > 0.4 * result.total, result.table()
