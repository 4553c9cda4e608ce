"""Damaged and hostile files end with one message, soon and cheaply, and change nothing."""

from __future__ import annotations

import pytest

from .reading import cases_of, problem_of

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


@pytest.mark.parametrize("attack", ["config", "weights", "method", "kinds", "random", "checkpoint"])
@pytest.mark.filterwarnings("ignore")
def test_files_end_with_a_message_and_cost_little(attack, tmp_path):
    problems = {name: problem_of(words, action) for name, words, action in cases_of(attack, tmp_path)}
    assert len(problems) > 10 and not any(problems.values()), {name: text for name, text in problems.items() if text}
