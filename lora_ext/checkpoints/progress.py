"""How far a long command is, on standard error: by tqdm where it is installed, else a line a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Progress", "progress"]


class Progress:
    """Counts bytes; shows nothing."""

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more are done."""

    def file(self, name: str) -> None:
        """``name`` is worked on now."""


class _Bar(Progress):
    def __init__(self, bar) -> None:
        self._bar = bar

    def advance(self, nbytes: int) -> None:
        self._bar.update(nbytes)

    def file(self, name: str) -> None:
        self._bar.set_postfix_str(name)


class _Lines(Progress):
    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0

    def advance(self, nbytes: int) -> None:
        self._done += nbytes

    def file(self, name: str) -> None:
        print(f"{self._what}: {self._done / max(self._total, 1):4.0%} {name}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, show: bool) -> Iterator[Progress]:
    """A display of ``total`` bytes within the context."""
    if not show:
        yield Progress()
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield _Lines(what, total)
        return
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield _Bar(bar)
