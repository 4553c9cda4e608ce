"""The number of fuzzed cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fuzz.areas import FIXED_CASES


@pytest.fixture
def fixed_cases(request: pytest.FixtureRequest) -> Callable[[str], range]:
    """Returns the seeds of an area, with --slow or without."""
    slow = request.config.getoption("--slow")
    return lambda area: range(FIXED_CASES[area][slow])
