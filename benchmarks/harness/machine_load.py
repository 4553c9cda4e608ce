"""How busy others kept the processors during a run: their work makes times longer, some of them much."""

from __future__ import annotations

import os
from pathlib import Path

_STAT = Path("/proc/stat")


class MachineLoad:
    """The processors' time from here on; processes of this one that have ended count as its own."""

    def __init__(self) -> None:
        self.start = self._seconds()

    def of_others(self) -> float | None:
        """The share of the processors' time that was neither idle nor this process's; None where no one tells."""
        if self.start is None or (now := self._seconds()) is None:
            return None
        total, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(busy - own, 0.0) / total if total > 0 else None

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Since the machine's start, added over processors: all time, busy time, and this process's since its own."""
        try:
            fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]  # idle, waiting for a disk; the eighth is what a hypervisor gave to other guests
        ticks, own = os.sysconf("SC_CLK_TCK"), os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return sum(fields) / ticks, (sum(fields) - idle) / ticks, mine
