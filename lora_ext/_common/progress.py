"""Shows how far long work is, on standard error: as a bar on a terminal, as a line now and then in a pipe or a file."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

_FIRST = 1.0  # seconds until the first line: what ends sooner needs none
_BETWEEN = 10.0  # seconds between two lines, at least: short enough to see that the work continues
_TOO_EARLY = 0.005  # no estimate below this fraction of the work: starting takes most of that time
_PARTS = 100  # and at least this fraction of the work, so that a run of days has about a hundred lines too


class Progress:
    """Counts finished work without showing it. As a context manager it ends the display."""

    def __init__(self, total: float, done: float = 0.0) -> None:
        self.total, self.done = total, done

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def advance(self, amount: float) -> None:
        """Adds ``amount`` to the finished work."""
        self.set(self.done + amount)

    def set(self, done: float) -> None:
        """Sets the amount of finished work."""
        self.done = done

    def note(self, text: str) -> None:
        """Sets a note on the current work, such as a file's name."""

    def close(self) -> None:
        """Ends the display."""


class _Bar(Progress):
    def __init__(self, total: float, done: float, bar: Any) -> None:
        super().__init__(total, done)
        self._bar, self._text = bar, ""

    def set(self, done: float) -> None:
        self._bar.update(done - self.done)
        self.done = done

    def note(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()


class _Lines(Progress):
    def __init__(self, what: str, total: float, done: float, unit: str, first: float) -> None:
        super().__init__(total, done)
        self._what, self._unit, self._text = what, unit, ""
        self._begin, self._done_before = time.monotonic(), done
        self._next_time, self._next_done = self._begin + first, done
        self._printed: tuple[float, str] | None = None  # the work done and the note of the last line
        self._lock = threading.Lock()  # runs side by side tell one display

    def set(self, done: float) -> None:
        self.done = done
        with self._lock:
            if time.monotonic() >= self._next_time and done >= self._next_done:
                self._print()

    def note(self, text: str) -> None:
        self._text = text

    def close(self) -> None:
        """Prints the last line, if there was one before and the work has advanced or its note changed since."""
        with self._lock:
            if self._printed not in (None, (self.done, self._text)):
                self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._printed, self._next_time = (self.done, self._text), now + _BETWEEN
        self._next_done = self.done + self.total / _PARTS
        seconds, done = now - self._begin, self.done - self._done_before
        parts = [f"{self._what}: {self.done / self.total if self.total else 1.0:.0%}{self._of()}, {_clock(seconds)}"]
        if done > _TOO_EARLY * self.total and self.done < self.total:
            parts.append(f"about {_clock(seconds / done * (self.total - self.done))} left")
        parts += [self._text] if self._text else []
        print(", ".join(parts), file=sys.stderr, flush=True)

    def _of(self) -> str:
        if self._unit == "B":
            return f" of {self.total / 1e9:.2f} GB" if self.total >= 1e9 else f" of {self.total / 1e6:.1f} MB"
        return f" of {self.total:,} {self._unit}" if self._unit else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def is_terminal() -> bool:
    """Returns whether standard error is a terminal, which can show a bar."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(
    what: str,
    total: float,
    *,
    unit: str = "B",
    show: bool = True,
    done: float = 0,
    first: float = _FIRST,
    **bar_options: Any,
) -> Progress:
    """Begins a display of ``total`` units of work.

    A terminal gets tqdm's bar, if tqdm is installed. Otherwise there are lines: one when ``first`` seconds have passed,
    then at most one every 10 seconds and every hundredth of the work, and the last state. What takes less than
    ``first`` seconds prints no line.

    Args:
        unit: plural, as in "120 steps"; "B" for bytes; "" for a total that says nothing.
        show: False for a display that shows nothing.
        done: units that an earlier run has done.
        bar_options: further arguments of ``tqdm``.
    """
    if not show:
        return Progress(total, done)
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not is_terminal():
        return _Lines(what, total, done, unit, first)
    if unit == "B":
        bar_options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} | bar_options
    return _Bar(total, done, tqdm(desc=what, total=total, initial=done, file=sys.stderr, **bar_options))
