"""What tests of the commands share: reading results, and the one line of a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., tuple[int, str, str]]
"""Runs a command. Returns its exit status, and what it printed on standard output and standard error."""


def metrics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def mistake(result: tuple[int, str, str]) -> str:
    """Returns the only line of an error, without the command's name."""
    status, _, messages = result
    lines = [line for line in messages.splitlines() if line.startswith("lora-ext")]
    assert status == 2, messages
    assert len(lines) == 1, messages
    return lines[0].partition(" error: ")[2]
