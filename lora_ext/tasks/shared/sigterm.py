"""Lets SIGTERM end a command as Ctrl-C does: schedulers and containers send it some seconds before SIGKILL."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_received = False


def received() -> bool:
    """Returns whether SIGTERM has arrived in the last :func:`listening` block of this process, or a block within it."""
    return _received


def _interrupt() -> None:
    raise KeyboardInterrupt


class _Handler:
    """Handles SIGTERM. Its class tells it from the handlers of other libraries."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def __call__(self, signum: int, frame: Any) -> None:
        global _received
        if not _received:
            _received = True
            self._then()


@contextmanager
def listening(then: Callable[[], None] = _interrupt) -> Iterator[None]:
    """Calls ``then`` at the first SIGTERM within the block and those around it; the default raises KeyboardInterrupt.

    Only the first counts: a scheduler may send it to a process that has it from its parent already, and a second
    interrupt would stop at once what still writes a checkpoint. Changes nothing outside the main thread, where the
    signal is ignored, and where another library handles it: submitit does, to start a job again.
    """
    global _received
    previous = signal.getsignal(signal.SIGTERM)
    is_free = previous is signal.SIG_DFL or isinstance(previous, _Handler)
    if threading.current_thread() is not threading.main_thread() or not is_free:
        yield
        return
    if previous is signal.SIG_DFL:
        _received = False
    signal.signal(signal.SIGTERM, _Handler(then))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
