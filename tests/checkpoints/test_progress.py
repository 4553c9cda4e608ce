"""The display of how far a command on checkpoints is."""

from __future__ import annotations

import sys

import pytest

from lora_ext._common import progress as displays
from lora_ext._common.progress import Progress

pytestmark = pytest.mark.cpu_only("has no tensors")


def test_a_bar_shows_the_work_and_its_note(monkeypatch, capsys):
    monkeypatch.setattr(displays, "_DELAY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("merge", 100) as shown:
        shown.note("a file")
        shown.advance(100)
    assert "merge: 100%" in (text := capsys.readouterr().err) and "a file" in text and "100/100" in text


@pytest.mark.parametrize("case", ["short", "not shown", "without tqdm"])
def test_nothing_is_shown(case, monkeypatch, capsys):
    """What ends within a second shows nothing, so that an error stays one line."""
    if case != "short":
        monkeypatch.setattr(displays, "_DELAY", 0.0)
    if case == "without tqdm":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with Progress("merge", 100, show=case != "not shown") as shown:
        shown.advance(100)
    assert capsys.readouterr().err == ""
