"""Fuzzes models through the random lives of tests/adapters/test_life_cycle.py, which says what each step must give."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

from adapters.test_life_cycle import Life

from .cases import Case, Outcome, finding
from .choices import Choices

_STEPS = 30


def make(choices: Choices) -> Case:
    seed = choices.integer(1 << 30)
    return Case("a life", f"Life({seed}, directory)\n", lambda: _run(seed))


def _run(seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as directory:
        life = Life(seed, Path(directory))
        for step in range(_STEPS):
            try:
                life.step()
            except BaseException as error:  # pytest's failures, too
                place = traceback.extract_tb(error.__traceback__)[1:3][-1].name  # the operation
                detail = f"{type(error).__name__}: {error} in step {step}: {place}\n{traceback.format_exc()}"
                return Outcome("compared", [finding("wrong result", "a life", detail, place)])
    return Outcome("compared")
