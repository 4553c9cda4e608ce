"""The display of how far a command on checkpoints is."""

from __future__ import annotations

import builtins
import sys

import pytest

from lora_ext._common import progress as displays
from lora_ext._common.progress import Progress

pytestmark = pytest.mark.cpu_only("has no tensors")


def show(total: int = 100) -> None:
    with Progress("merge", total) as shown:
        shown.note("a file")
        shown.advance(total)


def test_a_bar_shows_the_work_and_its_note(monkeypatch, capsys):
    monkeypatch.setattr(displays, "_DELAY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show()
    assert "merge: 100%" in (text := capsys.readouterr().err) and "a file" in text and "100/100" in text


@pytest.mark.parametrize("case", ["short", "not shown", "without tqdm"])
def test_nothing_is_shown(case, monkeypatch, capsys):
    """What ends within a second shows nothing, so that an error stays one line."""
    if case != "short":
        monkeypatch.setattr(displays, "_DELAY", 0.0)
    if case == "without tqdm":
        imported = builtins.__import__

        def without_tqdm(name, *args, **kwargs):
            if name == "tqdm":
                raise ImportError(name)
            return imported(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_tqdm)
    if case == "not shown":
        with Progress("merge", 100, show=False) as shown:
            shown.advance(100)
    else:
        show()
    assert capsys.readouterr().err == ""
