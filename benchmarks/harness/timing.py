"""Interleaved timing: every round runs each contestant once, in a new random order, so drift affects all equally."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

Clock = Callable[[Callable[[], object]], float]


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds on the host."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class CudaClock:
    """Seconds between two events around the call, with the L2 cache emptied of earlier calls.

    Overwriting the cache also keeps the GPU busy while Python launches the call. So the time of a short call is the
    GPU's, not the host's launch time; with many launches it is still the host's.
    """

    def __init__(self) -> None:
        cache_bytes = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(4 * cache_bytes, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


def interleaved(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    budget_s: float = 20.0,
    least: int = 5,
    warmup: int = 3,
    clock: Clock = wall_clock,
) -> dict[str, list[float]]:
    """Returns seconds of each round by contestant; the rounds of two contestants pair up for :func:`ratio`.

    Stops after ``rounds``, or after ``budget_s`` seconds and at least ``least`` rounds. Warm-up rounds are not counted;
    only one is run if more would take a quarter of the budget.
    """
    names = list(contestants)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_number in range(-warmup, rounds):
        spent = time.perf_counter() - start
        if round_number >= least and spent > budget_s:
            break
        if -warmup < round_number < 0 and spent > budget_s / 4:
            continue
        order.shuffle(names)
        for name in names:
            elapsed = clock(contestants[name])
            if round_number >= 0:
                seconds[name].append(elapsed)
    return {name: seconds[name] for name in contestants}


def ratio(seconds: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the round-by-round ratios.

    Not the ratio of the medians: where rounds differ, as batches of texts do, those are of different rounds.
    """
    low, median, high = statistics.quantiles([a / b for a, b in zip(seconds, baseline, strict=True)], n=4)
    return median, low, high
