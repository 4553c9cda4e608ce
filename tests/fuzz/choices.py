"""The random numbers that define a case: drawn from a seed and recorded, or replayed.

A generator that takes all its randomness from :class:`Choices` can be replayed, and its output can be minimised without
knowing what it is: zero is the simplest choice, and a list that is too short continues with zeros.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """A source of choices; ``made`` records them."""

    def __init__(self, seed: int | str = 0, replay: Sequence[int] | None = None):
        self._random = random.Random(seed)
        self._replay = replay
        self.made: list[int] = []

    def integer(self, count: int) -> int:
        """One of ``0 .. count - 1``; 0 is the simplest."""
        if self._replay is None:
            value = self._random.randrange(count)
        else:
            at = len(self.made)
            value = min(self._replay[at], count - 1) if at < len(self._replay) else 0
        self.made.append(value)
        return value

    def between(self, low: int, high: int) -> int:
        """``low`` to ``high``, both included; ``low`` is the simplest."""
        return low + self.integer(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 cases; False is simpler."""
        return self.integer(100) >= 100 - percent

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; the first is the simplest."""
        return options[self.integer(len(options))]


def smaller(choices: Sequence[int], fails: Callable[[list[int]], bool], tries: int = 300) -> list[int]:
    """Finds smaller choices, within ``tries`` tries, for which ``fails`` still holds.

    Removes blocks of choices, then makes the choices smaller, until neither changes anything.
    """
    best, remaining = list(choices), tries

    def holds(candidate: list[int]) -> bool:
        nonlocal best, remaining
        if remaining <= 0 or candidate == best:
            return False
        remaining -= 1
        if not fails(candidate):
            return False
        best = candidate
        return True

    before: list[int] | None = None
    while best != before and remaining > 0:
        before = best
        for size in (32, 8, 2, 1):
            at = len(best) - size
            while at >= 0:
                holds(best[:at] + best[at + size :])
                at -= size
        for size in (8, 1):
            for at in range(0, len(best), size):
                holds(best[:at] + [0] * len(best[at : at + size]) + best[at + size :])
        for at in range(len(best)):
            while at < len(best) and best[at] > 1:
                if not holds(best[:at] + [best[at] // 2] + best[at + 1 :]):
                    break
            if at < len(best) and best[at] > 0:
                holds(best[:at] + [best[at] - 1] + best[at + 1 :])
    return best
