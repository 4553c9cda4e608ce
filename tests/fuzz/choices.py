"""The random numbers that define a case; a seed makes the same case again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices(random.Random):
    def integer(self, count: int) -> int:
        """One of ``0 .. count - 1``."""
        return self.randrange(count)

    def between(self, low: int, high: int) -> int:
        """``low`` to ``high``, both included."""
        return self.randint(low, high)

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 cases."""
        return self.randrange(100) < percent

    def pick(self, options: Sequence[T]) -> T:
        return options[self.randrange(len(options))]
