"""Shows how far long work is, on standard error: tqdm's bar, or nothing where tqdm is not installed."""

from __future__ import annotations

import sys

_SECONDS = 10.0  # between two lines of a pipe or a file
_DELAY = 1.0  # seconds: what ends sooner shows nothing


class Progress:
    """A display of ``total`` units of work (bytes), if ``show`` is set; as a context manager it ends the display."""

    def __init__(self, what: str, total: int, *, unit: str = "B", show: bool = True) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            show = False
        self._bar = None
        if show:
            interval = 0.1 if sys.stderr is not None and sys.stderr.isatty() else _SECONDS
            size = {"total": total, "unit": unit, "unit_scale": unit == "B", "unit_divisor": 1024}
            self._bar = tqdm(desc=what, **size, delay=_DELAY, mininterval=interval)

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
