"""Detects that other processes slow training down, and advises the user."""

from __future__ import annotations

import os

_ABOVE = 1.25  # load per core above which the machine is busy
_SLOW = 1.0  # seconds a step; faster steps need no advice


def advice(threads: int, step_seconds: float) -> str | None:
    """Returns a line for the user; None if steps are fast, one thread computes, or the machine has idle cores.

    PyTorch splits each product over all threads and waits for the last one. If other processes hold the cores, each
    wait lasts one of their time slices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    if threads < 2 or step_seconds < _SLOW or load <= _ABOVE * cores:
        return None
    return (
        f"a step takes {step_seconds:.1f} s, and {load:.1f} processes share the {cores} cores: fewer threads than "
        f"{threads} may be faster (Ctrl-C, then --resume --threads 1)"
    )
