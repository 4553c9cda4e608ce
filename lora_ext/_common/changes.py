"""Makes one thread at a time change models, or read one for a file.

The process has one lock because models may share weights; a merge uses all cores anyway. Forwards take no lock: a
change during a forward in another thread is the caller's error.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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
