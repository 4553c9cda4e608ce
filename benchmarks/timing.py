"""Interleaved timing: every round runs each contestant once, in a fresh random order, so that drift hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable


def interleaved(
    contestants: dict[str, Callable[[], object]], rounds: int, budget_s: float = 20.0, least: int = 11, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds per call and round, by contestant; the rounds of two contestants pair up for :func:`ratio`.

    Stops after ``rounds``, or once ``budget_s`` seconds are spent and ``least`` rounds are done.
    """
    names = list(contestants)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_number in range(-warmup, rounds):
        if round_number >= least and time.perf_counter() - start > budget_s:
            break
        order.shuffle(names)
        for name in names:
            begin = time.perf_counter()
            contestants[name]()
            elapsed = time.perf_counter() - begin
            if round_number >= 0:
                seconds[name].append(elapsed)
    return {name: seconds[name] for name in contestants}


def ratio(seconds: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians, and the quartiles of the ratios round by round (the spread)."""
    pairs = sorted(a / b for a, b in zip(seconds, baseline, strict=True))
    low, _, high = statistics.quantiles(pairs, n=4)
    return statistics.median(seconds) / statistics.median(baseline), low, high
