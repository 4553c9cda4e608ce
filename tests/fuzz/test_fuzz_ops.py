"""Runs the op fuzzer from fixed seeds: malformed and extreme calls, and valid ones whose results are compared."""

from __future__ import annotations

import pytest

from fuzz import campaign
from fuzz.area_ops import OPS
from fuzz.areas import FIXED_CASES

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]

PARTS = 2
CUDA_ONLY = {"lora_merge_check"}


@pytest.mark.skipif("ops" not in FIXED_CASES, reason="tests/fuzz/areas.py leaves the ops out")
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_is_found(part, fixed_cases):
    result = campaign.run("ops", fixed_cases("ops")[part::PARTS], processes=1)
    assert not result.found, "\n".join(found.text() for found in result.found.values())
    # Half of the calls are valid, and most of the others are refused.
    assert sum(counter["compared"] for counter in result.counts.values()) > 0.4 * result.total, result.table()
    for name in OPS.keys() - CUDA_ONLY:
        assert result.counts[f"torch.ops.lora_ext.{name}"]["compared"], result.table()
