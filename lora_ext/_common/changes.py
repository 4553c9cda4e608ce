"""Makes changes of models atomic for Ctrl-C, for other threads and for forwards that run at the same time.

All functions that change a model, or read it for a file, hold one lock (:func:`one_at_a_time`), so their checks still
hold when they act. The process has one lock because models may share weights; a merge uses all cores anyway. A fork
waits for it.

Forwards take no lock. When a change begins or ends during a layer's forward, the forward is computed again with the
lock held (:func:`of_one_state`). On a GPU this orders kernel launches only: forward and change must use one stream.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from lora_ext._common.interrupts import uninterrupted

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # the child lacks the thread that would finish a change
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Makes ``function`` hold the lock: only one thread at a time runs any function of this kind."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock:
            return function(*args, **kwargs)

    return run


@contextmanager
def changing(*models: ActiveAdapters) -> Iterator[None]:
    """Marks a block that changes the layers of ``models``, given by their shared state. Ctrl-C waits for its end."""
    with ExitStack() as stack:
        stack.enter_context(_lock)
        stack.enter_context(uninterrupted())
        for active in models:
            stack.enter_context(active.changing())
        yield


class _Thread(threading.local):
    depth = 0  # of without_lock()


_thread = _Thread()


@contextmanager
def without_lock() -> Iterator[None]:
    """Makes forwards within the context take no lock: for a forward that holds another one, which others wait for.

    What changes meanwhile is noticed by that forward, which must be :func:`of_one_state`, and is computed again as a
    whole.
    """
    _thread.depth += 1
    try:
        yield
    finally:
        _thread.depth -= 1


def of_one_state(forward: Callable[P, R]) -> Callable[P, R]:
    """Makes a layer's forward see its state before or after a change, never half of one."""

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        if torch.compiler.is_compiling():  # a count that changes would be a guard that fails
            return forward(self, *args, **kwargs)
        active = self.active
        changes = active.changes
        if not changes % 2 or _thread.depth:
            try:
                result = forward(self, *args, **kwargs)
            except Exception:
                if active.changes == changes or _thread.depth:
                    raise
            else:
                if active.changes == changes or _thread.depth:
                    return result
        with _lock:
            return forward(self, *args, **kwargs)

    return run
