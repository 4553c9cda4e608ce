"""The choices that make a case: hypothesis draws and shrinks them, and the process that runs the case repeats them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices(random.Random):
    """Numbers that are all made of ``draw(count)``, which returns one of ``0 .. count - 1``; 0 is the simplest."""

    def __init__(self, draw: Callable[[int], int]) -> None:
        super().__init__()
        self._draw = draw

    def _randbelow(self, count: int) -> int:  # the base class makes randrange, choice and sample of these three
        return self._draw(count)

    def random(self) -> float:
        return self._draw(1000) / 1000

    def getrandbits(self, bits: int) -> int:
        return random.Random(self._draw(1 << 16)).getrandbits(bits)

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 cases."""
        return self._draw(100) >= 100 - percent

    def some(self, options: Sequence[T], least: int, most: int) -> list[T]:
        return self.sample(options, min(self.randint(least, most), len(options)))


def repeated(drawn: Sequence[int]) -> Choices:
    """Returns the choices that were drawn before."""
    numbers = iter(drawn)
    return Choices(lambda count: next(numbers))
