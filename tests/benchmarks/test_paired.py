"""Tests the interval of a difference of accuracies: paired texts, seeds, and runs on different texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from harness.paired import correct_answers, paired_difference

pytestmark = pytest.mark.cpu_only("statistics")


def write(directory: Path, right: list[bool], first_line: int = 0) -> Path:
    directory.mkdir()
    rows = [{"line": first_line + i, "label": "a", "predicted": "a" if one else "b"} for i, one in enumerate(right)]
    (directory / "predictions.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    return directory


def test_answers_are_aligned_by_line(tmp_path: Path):
    runs = [write(tmp_path / "0", [True, False, True]), write(tmp_path / "1", [False, False, True])]
    assert correct_answers(runs).tolist() == [[True, False, True], [False, False, True]]
    with pytest.raises(ValueError, match="other test texts"):
        correct_answers([runs[0], write(tmp_path / "2", [True, False, True], first_line=1)])


def test_equal_answers_have_no_spread():
    right = torch.rand(1, 500, generator=torch.Generator().manual_seed(0)) < 0.8
    assert paired_difference(right, right) == {"mean": 0, "low": 0, "high": 0}


def test_the_interval_is_the_normal_one_where_that_is_known():
    draw = torch.Generator().manual_seed(1)
    first, second = (torch.rand(1, 2000, generator=draw) < share for share in (0.8, 0.7))
    found = paired_difference(first, second)
    apart = first.double() - second.double()
    half = 1.96 * apart.std().item() / math.sqrt(2000)
    assert found["mean"] == pytest.approx(apart.mean().item())
    assert found["low"] == pytest.approx(found["mean"] - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(found["mean"] + half, abs=0.1 * half)


def test_seeds_that_differ_widen_the_interval():
    one = torch.rand(1, 2000, generator=torch.Generator().manual_seed(2)) < 0.8
    worse = one & (torch.rand(1, 2000, generator=torch.Generator().manual_seed(3)) < 0.9)
    narrow, wide = (paired_difference(runs, one) for runs in (torch.cat([worse, worse]), torch.cat([one, worse])))
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])
