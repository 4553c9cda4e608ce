"""Damaged and hostile files end with one message, soon and cheaply, and change nothing."""

from __future__ import annotations

import pytest
from support.processes import run_forked

from .reading import cases_of, problem_of

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")
ATTACKS = ["config", "weights", "method", "kinds", "random", "checkpoint"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_small_files_end_with_a_message(attack, tmp_path):
    problems = {name: problem_of(words, action) for name, words, action in cases_of(attack, tmp_path, 20_000)}
    assert len(problems) > 10 and not any(problems.values()), {name: text for name, text in problems.items() if text}


@pytest.mark.full
@pytest.mark.parametrize("attacks", [ATTACKS[:1], ATTACKS[1:]], ids="-".join)
def test_a_file_costs_little(attacks, tmp_path):
    # A process that has started threads cannot fork.
    done = run_forked("-m", "hostile.reading", tmp_path, *attacks, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
