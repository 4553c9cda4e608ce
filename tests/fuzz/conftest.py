"""The number of fuzzed cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fuzz.areas import FIXED_CASES


@pytest.fixture
def fixed_cases(request: pytest.FixtureRequest) -> Callable[[str], range]:
    """Returns the seeds of an area: all with --slow, else the first half."""
    share = 1 if request.config.getoption("--slow") else 2
    return lambda area: range(FIXED_CASES[area] // share)
