"""Delays Ctrl-C where it would do harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_inside = False  # the main thread is in an uninterrupted block


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Makes Ctrl-C wait for the end of the block and of all blocks around it.

    Python raises KeyboardInterrupt as soon as the running op returns, before the caller can record what the op did.
    Only the main thread gets it, so other threads need nothing.
    """
    global _inside
    if threading.current_thread() is not threading.main_thread() or _inside:
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        yield
        return
    caught: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    _inside = True
    try:
        yield
    finally:
        _inside = False
        signal.signal(signal.SIGINT, previous)
        if caught:
            previous(*caught[-1])
