"""`make test-quick`: the tests that it leaves out exist."""

import re
from pathlib import Path

from conftest import FULL

TESTS = Path(__file__).parent


def test_what_is_left_out_is_there():
    sources = {
        f"tests/{path.relative_to(TESTS).as_posix()}": path.read_text("utf-8") for path in TESTS.rglob("test_*.py")
    }
    names = [f"{file}::{name}" for file, text in sources.items() for name in re.findall(r"^def (test_\w+)", text, re.M)]
    everything = "\n".join([*names, *sources.values()])
    assert len(names) > 500
    assert not [part for part in FULL if part.rstrip("]") not in everything]
