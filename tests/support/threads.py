"""Functions that run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def run_together(*actions: Callable[[], object], seconds: float = 20.0) -> list[BaseException | None]:
    """Starts all actions at once; returns the error of each, or None."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], object]) -> BaseException | None:
        barrier.wait()
        try:
            action()
        except BaseException as error:
            return error

    pool = ThreadPoolExecutor(len(actions))
    try:
        futures = [pool.submit(run, action) for action in actions]
        return [future.result(timeout=seconds) for future in futures]  # a hang is a failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
