"""Shows how far long work is, on standard error: a bar on a terminal, a line every 10 seconds in a pipe or a file."""

from __future__ import annotations

import sys
from typing import Any

_SECONDS = 10.0  # between two lines of a pipe or a file
_DELAY = 1.0  # seconds: what ends sooner shows nothing


class Progress:
    """A display of finished work; as a context manager it ends the display. Without a bar it shows nothing."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: float) -> None:
        """Adds ``amount`` to the finished work."""
        if self._bar is not None:
            self._bar.update(amount)

    def note(self, text: str) -> None:
        """Shows a note on the current work, such as a file's name."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)


def progress(what: str, total: int, *, unit: str = "B", show: bool = True) -> Progress:
    """Begins a display of ``total`` units of work (bytes), if ``show`` is set and tqdm is installed."""
    if not show:
        return Progress()
    try:
        from tqdm import tqdm
    except ImportError:
        return Progress()
    interval = 0.1 if sys.stderr is not None and sys.stderr.isatty() else _SECONDS
    size = {"total": total, "unit": unit, "unit_scale": unit == "B", "unit_divisor": 1024}
    return Progress(tqdm(desc=what, **size, delay=_DELAY, mininterval=interval))
