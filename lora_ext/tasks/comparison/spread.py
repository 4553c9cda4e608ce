"""Statistics over seeds: mean, standard deviation, and whether one result leads by more than the spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNKNOWN_SPREAD = "with one seed the spread is unknown, so none is marked"


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Returns ``values``, their ``mean`` and sample standard deviation ``sd`` (None for a single value)."""
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def winner(summaries: Mapping[Any, Mapping[str, Any]]) -> Any | None:
    """Returns the key of the best mean if it leads every other by more than ``sqrt(sd ** 2 + sd_other ** 2)``.

    None otherwise. Also None with a single key or a single value per key: the spread is then unknown.
    """
    if len(summaries) < 2 or any(one["sd"] is None for one in summaries.values()):
        return None
    best = max(summaries, key=lambda key: summaries[key]["mean"])
    leader = summaries[best]
    for key, other in summaries.items():
        if key != best and leader["mean"] - other["mean"] <= math.hypot(leader["sd"], other["sd"]):
            return None
    return best


def percent(shares: Mapping[str, Any]) -> str:
    """Formats a :func:`summary` of shares in percent, such as ``81.2 ± 0.4``."""
    spread = "" if shares["sd"] is None else f" ± {100 * shares['sd']:.1f}"
    return f"{100 * shares['mean']:.1f}{spread}"


def over_seeds(seeds: Sequence[int]) -> str:
    """Returns the title of a chart: ``mean and standard deviation over 3 seeds``, or ``seed 0``."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean and standard deviation over {len(seeds)} seeds"


def deviation_over(seeds: Sequence[int]) -> str:
    """Returns the caption of a table: ``Mean ± standard deviation over seeds 0, 1``, or ``Seed 0``."""
    several = "Mean ± standard deviation over seeds " + ", ".join(map(str, seeds))
    return several if len(seeds) > 1 else f"Seed {seeds[0]}"


# Options that set the number of trained parameters.
_SIZES = ("r", "bottleneck_size", "prefix_length", "infix_length", "drop_layers")


def lines_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups rows of a comparison into the lines of a chart; returns ``{name of the line: rows}``.

    Rows whose settings differ in one size only, such as the rank, form one line, sorted by trained parameters. Every
    other row is a separate line.
    """
    lines: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(_same(row["settings"], _SIZES), []).append(row)
    named: dict[str, list[Mapping[str, Any]]] = {}
    for similar in lines.values():
        differing = [size for size in _SIZES if len({row["settings"].get(size) for row in similar}) > 1]
        if len(differing) == 1:
            line = sorted(similar, key=lambda row: row["trained_parameters"])
            sizes = ", ".join(str(row["settings"][differing[0]]) for row in line)
            labels = ", ".join(row["label"] for row in line)
            first = labels if named_rows(line) else _without_size(line[0]["label"], differing[0])
            name = f"{first}, {differing[0].replace('_', ' ')} {sizes}"
            named[name] = line
        else:  # one point, or points that differ in two sizes
            named |= {row["label"]: [row] for row in similar}
    return named


def named_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns ``{name: spec}`` for the rows whose method has a ``name=``."""
    return {row["label"]: row["spec"] for row in rows if row.get("spec", row["label"]) != row["label"]}


def _same(settings: Mapping[str, Any], ignored: Sequence[str]) -> tuple:
    return tuple(sorted((name, repr(value)) for name, value in settings.items() if name not in ignored))


def _without_size(label: str, size: str) -> str:
    parts = [part for part in label.split(":") if not part.startswith(f"{size.replace('_', '-')}=")]
    return ":".join(parts)
