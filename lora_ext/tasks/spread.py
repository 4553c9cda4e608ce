"""Figures of several seeds: their mean, their spread, and who is better than the spread explains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, Any]:
    """``values``, their ``mean`` and sample standard deviation ``sd`` (None of a single one)."""
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def winner(summaries: Mapping[Any, Mapping[str, Any]]) -> Any | None:
    """The key of the best mean, where it leads every other one by more than ``sqrt(sd ** 2 + sd_other ** 2)``.

    None otherwise, and where there is but one value or one key: nothing then says how far chance reaches.
    """
    if len(summaries) < 2 or any(each["sd"] is None for each in summaries.values()):
        return None
    best = max(summaries, key=lambda key: summaries[key]["mean"])
    ours = summaries[best]
    for key, other in summaries.items():
        if key != best and ours["mean"] - other["mean"] <= math.hypot(ours["sd"], other["sd"]):
            return None
    return best


def percent(each: Mapping[str, Any]) -> str:
    """``81.2 ± 0.4`` of a :func:`summary` of shares."""
    spread = "" if each["sd"] is None else f" ± {100 * each['sd']:.1f}"
    return f"{100 * each['mean']:.1f}{spread}"
