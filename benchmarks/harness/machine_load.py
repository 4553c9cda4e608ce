"""Measures how busy other processes kept the processors during a run: their work makes times longer, some much."""

from __future__ import annotations

import os
from pathlib import Path

_STAT = Path("/proc/stat")


class MachineLoad:
    """Counts the processors' time since its creation; this process includes its children that have ended."""

    def __init__(self) -> None:
        self.start = self._seconds()

    def of_others(self) -> float | None:
        """Fraction of the processors' time that was neither idle nor this process's; None if it is unknown."""
        if self.start is None or (now := self._seconds()) is None:
            return None
        total, busy, ours = (b - a for a, b in zip(self.start, now, strict=True))
        return max(busy - ours, 0.0) / total if total > 0 else None

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Seconds summed over processors: all and busy time since the machine's start, this process's since its own."""
        try:
            fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]  # idle, waiting for a disk; the eighth is time that a hypervisor gave away
        ticks = os.sysconf("SC_CLK_TCK")
        ours = sum(os.times()[:4])  # user and system, of this process and its children
        return sum(fields) / ticks, (sum(fields) - idle) / ticks, ours
