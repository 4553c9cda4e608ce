"""Whether other work slows this down, and what to do about it."""

from __future__ import annotations

import os

__all__ = ["advice"]

_ABOVE = 1.25  # of the cores: more wants to run than can
_SLOW = 1.0  # seconds a step: whoever waits less does not ask why


def advice(threads: int, step_seconds: float) -> str | None:
    """A line for the user; None: steps are fast, one thread computes, or the machine has room.

    PyTorch hands each part of a product to all threads, and waits for the last one. Where other processes take the
    cores meanwhile, each of these waits takes a turn of theirs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    if threads < 2 or step_seconds < _SLOW or load <= _ABOVE * cores:
        return None
    return (
        f"a step takes {step_seconds:.1f} s, and {load:.1f} processes want the {cores} cores: fewer threads than "
        f"{threads} may be faster (Ctrl-C, and then --resume --threads 1)"
    )
