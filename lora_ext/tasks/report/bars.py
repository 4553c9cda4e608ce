"""Horizontal bars in a table: names and figures are text of the page, so that they keep their size on any screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_ext.tasks.report.line_chart import NUM_COLOURS, figure, legend
from lora_ext.tasks.report.markup import Html, el

__all__ = ["Bar", "bars"]


@dataclass(frozen=True)
class Bar:
    """A row.

    Attributes:
        parts: one length, or several, one behind the other.
        text: the figure, for people.
        low, high: quartiles, as a line across the end; None: there are none.
        group: rows of one group have one colour, where the parts do not have one each; None: no colour.
    """

    name: str
    parts: Sequence[float]
    text: str
    low: float | None = None
    high: float | None = None
    group: int | None = None


def bars(
    caption: str, rows: Sequence[Bar], *, names: Sequence[str] = (), limit: tuple[float, str] | None = None
) -> Html:
    """Bars from 0, all on one scale.

    Args:
        names: of the parts.
        limit: a length that is marked in every row, and what it is.
    """
    known = [value for row in rows for value in (sum(row.parts), row.high or 0.0) if math.isfinite(value)]
    longest = max([*known, limit[0] if limit else 0.0, 0.0]) or 1.0
    body = []
    for row in rows:
        title = f"{row.name}: {row.text}"
        body.append(
            el(
                "tr",
                el("th", row.name, scope="row"),
                el("td", _bar(row, title, longest, bool(names), limit), class_="bar"),
                el(
                    "td",
                    row.text,
                    class_="n",
                    data_value=repr(sum(row.parts)) if math.isfinite(sum(row.parts)) else None,
                ),
            )
        )
    rows_of = el("table", el("tbody", *body), class_="bars", aria_label=caption)
    return figure(caption, rows_of, legend(names, swatches=True))


def _bar(row: Bar, title: str, longest: float, coloured: bool, limit: tuple[float, str] | None) -> Html:
    shapes, at = [], 0.0
    for number, part in enumerate(row.parts):
        if not math.isfinite(part) or part <= 0:
            continue
        width = 100 * part / longest
        colour = number if coloured else row.group
        class_ = "fill" if colour is None else f"fill s{colour % NUM_COLOURS}"
        shapes.append(el("rect", x=_at(at), y=2, width=_at(width), height=12, class_=class_))
        at += width
    if row.low is not None and row.high is not None:
        low, high = (100 * value / longest for value in (row.low, row.high))
        shapes.append(el("path", d=f"M{_at(low)} 8H{_at(high)}M{_at(low)} 5v6M{_at(high)} 5v6", class_="whisker"))
    if limit is not None:
        at = _at(100 * limit[0] / longest)
        shapes.append(el("path", el("title", limit[1]), d=f"M{at} 0v16", class_="limit"))
    # Stretched to the column's width: lines keep theirs by CSS (vector-effect).
    return el("svg", el("title", title), *shapes, viewBox="0 0 100 16", preserveAspectRatio="none", role="img")


def _at(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
