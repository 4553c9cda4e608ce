"""Runs the fuzzers of everything that reads files, from fixed seeds; tests/fuzz/area_files.py states the rules."""

from __future__ import annotations

import pytest

from fuzz import campaign

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]


def test_nothing_is_found(fixed_cases):
    result = campaign.run("files", fixed_cases("files"), processes=1)
    assert not result.found, "\n".join(found.text() for found in result.found.values())
    for function, counter in result.counts.items():  # valid files are read, too
        assert counter["compared"], f"{function}\n{result.table()}"
