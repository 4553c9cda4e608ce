"""From values to places in a chart, and the round numbers that its axes are marked with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["Scale", "number_text"]

_STEPS = (1, 2, 2.5, 5, 10)


class Scale:
    """Maps values onto ``[start, end]``, in an SVG's units.

    Args:
        values: that it has to show; those that are not finite, and on a logarithmic axis not positive, do not count.
        log: logarithmic.
        ticks: the marks; None: four to seven round numbers.
        from_zero: begins at 0.
        margin: added on both sides, as a part of the length, where the ends are no marks of their own.
    """

    def __init__(
        self,
        values: Iterable[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        ticks: Sequence[float] | None = None,
        from_zero: bool = False,
        margin: float = 0.05,
    ) -> None:
        self.log, self._start, self._end = log, start, end
        known = [value for value in values if self.shows(value)]
        low, high = (self._inner(f(known)) for f in (min, max)) if known else (0.0, 1.0)
        if from_zero and not log:
            low = min(low, 0.0)
        if high - low < 1e-9 * max(1.0, abs(high)):  # one value: in the middle
            low, high = (0.0 if from_zero else low - 0.5), high + 0.5
        room = margin * (high - low)
        self._low, self._high = (low if from_zero and not log else low - room), high + room
        self.ticks = [tick for tick in (ticks if ticks is not None else self._round_numbers()) if self._holds(tick)]

    def shows(self, value: float | None) -> bool:
        """Whether the value has a place."""
        return value is not None and math.isfinite(value) and (value > 0 or not self.log)

    def __call__(self, value: float) -> float:
        part = (self._inner(value) - self._low) / (self._high - self._low)
        return self._start + part * (self._end - self._start)

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _holds(self, tick: float) -> bool:
        return self.shows(tick) and self._low - 1e-12 <= self._inner(tick) <= self._high + 1e-12

    def _round_numbers(self) -> list[float]:
        if self.log and self._high - self._low >= 1:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):  # the fewest that leave something to read
                ticks = [digit * 10.0**power for power in powers for digit in digits]
                ticks = [tick for tick in ticks if self._holds(tick)]
                if len(ticks) >= 3:
                    break
            return ticks[:: math.ceil(len(ticks) / 7)]
        low, high = (10**end if self.log else end for end in (self._low, self._high))
        width = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(width))
        step = min((each * power for each in _STEPS), key=lambda each: abs(each - width))
        return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number_text(value: float) -> str:
    """A mark's text: ``0.25``, ``40``, ``3k``, ``20M``; powers of ten below a thousandth as ``1e-05``."""
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (1 - 1e-9):
            return f"{value / unit:.4g}{letter}"
    return f"{value:.3g}" if size >= 1e-3 or size < 1e-12 else f"{value:.0e}"
