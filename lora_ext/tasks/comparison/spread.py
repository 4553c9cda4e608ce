"""Figures of several seeds: their mean, their spread, and who is better than the spread explains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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


def over_seeds(seeds: Sequence[int]) -> str:
    """What a picture shows: ``mean and standard deviation over 3 seeds``, or of one seed."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean and standard deviation over {len(seeds)} seeds"


def deviation_over(seeds: Sequence[int]) -> str:
    """What a table shows: ``Mean ± standard deviation over seeds 0, 1``, or ``Seed 0``."""
    several = "Mean ± standard deviation over seeds " + ", ".join(map(str, seeds))
    return several if len(seeds) > 1 else f"Seed {seeds[0]}"


_SIZES = (
    "r",
    "bottleneck_size",
    "prefix_length",
    "infix_length",
    "drop_layers",
)  # options that say how much is trained


def lines_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of a comparison whose settings differ by one size alone, such as the rank, by the name of their line.

    Sorted by the parameters. Of other settings, as of LoRA on other weights, each row is a line of its own.
    """
    lines: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(_same(row["settings"], _SIZES), []).append(row)
    named: dict[str, list[Mapping[str, Any]]] = {}
    for own in lines.values():
        differing = [size for size in _SIZES if len({row["settings"].get(size) for row in own}) > 1]
        if len(differing) == 1:
            whole = sorted(own, key=lambda row: row["trained_parameters"])
            sizes = ", ".join(str(row["settings"][differing[0]]) for row in whole)
            labels = ", ".join(row["label"] for row in whole)
            first = labels if named_rows(whole) else _without_size(whole[0]["label"], differing[0])
            name = f"{first}, {differing[0].replace('_', ' ')} {sizes}"
            named[name] = whole
        else:  # one point, or points that two sizes tell apart
            named |= {row["label"]: [row] for row in own}
    return named


def named_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Names that the user gave to methods -> the methods as they were written, for the rows of a comparison."""
    return {row["label"]: row["spec"] for row in rows if row.get("spec", row["label"]) != row["label"]}


def _same(settings: Mapping[str, Any], but: Sequence[str]) -> tuple:
    return tuple(sorted((name, repr(value)) for name, value in settings.items() if name not in but))


def _without_size(label: str, size: str) -> str:
    parts = [part for part in label.split(":") if not part.startswith(f"{size.replace('_', '-')}=")]
    return ":".join(parts)
