"""Points, lines and bands over two axes, as SVG; every point says its figures when pointed at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_ext.tasks.report.markup import Html, el
from lora_ext.tasks.report.scales import Scale, number_text

__all__ = ["Point", "Series", "figure", "legend", "line_chart"]

# The text of a chart shrinks with it on a narrow screen: few units wide, so that it stays readable there.
_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 52
NUM_COLOURS = 10
_MARKERS = (  # of area alike; the shape tells series apart where colours do not
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -6.5L6.5 0L0 6.5L-6.5 0z",
    "M0 -6L6 5H-6z",
    "M0 6L6 -5H-6z",
    "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "M-6 0L5 -6V6z",
)


@dataclass(frozen=True)
class Point:
    """A place in a chart.

    Attributes:
        low, high: ends of its error bar, or of the band around its line; None: it has none.
        says: what it is, with its figures.
    """

    x: float
    y: float
    says: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line. ``band``: their ``low`` and ``high`` are shaded, in place of bars."""

    name: str
    points: Sequence[Point]
    band: bool = False


def line_chart(
    caption: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
    x_ticks: Sequence[float] | None = None,
    y_from_zero: bool = False,
) -> Html:
    """A chart with its legend and caption. Points without a place on a logarithmic axis are left out."""
    points = [point for each in series for point in each.points]
    x = Scale((point.x for point in points), _LEFT, _WIDTH - _RIGHT, log=x_log, ticks=x_ticks)
    heights = (value for point in points for value in (point.y, point.low, point.high) if value is not None)
    y = Scale(heights, _HEIGHT - _BOTTOM, _TOP, log=y_log, from_zero=y_from_zero)
    drawing = el(
        "svg",
        el("title", caption),
        *_grid(x, y, x_label, y_label),
        *(_draw(each, number, x, y) for number, each in enumerate(series)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        class_="chart",
    )
    return figure(caption, drawing, legend([each.name for each in series]))


def figure(caption: str, *content: Any) -> Html:
    return el("figure", el("figcaption", caption), *content)


def legend(names: Sequence[str], swatches: bool = False) -> Html | None:
    """Which colour is what: with the series' markers, or with ``swatches`` of bars. None of a single, nameless one."""
    if not any(names):
        return None
    items = []
    for number, name in enumerate(names):
        shape = "M-6 -6h12v12h-12z" if swatches else _MARKERS[number % len(_MARKERS)]
        mark = el(
            "svg", el("path", d=shape), viewBox="-8 -8 16 16", class_=f"mark {_colour(number)}", aria_hidden="true"
        )
        items.append(el("li", mark, name))
    return el("ul", *items, class_="legend")


def _colour(number: int) -> str:
    return f"s{number % NUM_COLOURS}"


def _grid(x: Scale, y: Scale, x_label: str, y_label: str) -> list[Html]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y.ticks:
        at = _at(y(tick))
        parts.append(el("line", x1=_LEFT, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(el("text", number_text(tick), x=_LEFT - 7, y=at, dy="0.35em", class_="end"))
    last = None
    for tick in x.ticks:
        place, text = x(tick), number_text(tick)
        parts.append(el("line", x1=_at(place), x2=_at(place), y1=_TOP, y2=bottom, class_="grid"))
        if last is None or place - last > 9 * len(text) + 6:  # else it would run into its neighbour
            parts.append(el("text", text, x=_at(place), y=bottom + 18, class_="middle"))
            last = place
    parts.append(el("text", x_label, x=(_LEFT + right) / 2, y=_HEIGHT - 10, class_="middle label"))
    middle = (_TOP + bottom) / 2
    parts.append(el("text", y_label, transform=f"translate(15 {middle}) rotate(-90)", class_="middle label"))
    return parts


def _draw(series: Series, number: int, x: Scale, y: Scale) -> Html:
    points = [point for point in series.points if x.shows(point.x) and y.shows(point.y)]
    places = [(point, x(point.x), y(point.y)) for point in points]
    parts = []
    ranges = [
        (point, at, y(point.low), y(point.high))
        for point, at, _ in places
        if y.shows(point.low) and y.shows(point.high)
    ]
    if series.band and len(ranges) > 1:
        edge = [(at, high) for _, at, _, high in ranges] + [(at, low) for _, at, low, _ in reversed(ranges)]
        parts.append(el("path", d=_path(edge) + "z", class_="band"))
    elif not series.band:
        for _, at, low, high in ranges:
            ends = f"M{_at(at - 4)} {_at(high)}h8M{_at(at - 4)} {_at(low)}h8"
            parts.append(el("path", d=f"M{_at(at)} {_at(low)}V{_at(high)}{ends}", class_="error"))
    if len(places) > 1:
        parts.append(el("path", d=_path([(at, height) for _, at, height in places]), class_="line"))
    marker = _MARKERS[number % len(_MARKERS)]
    for point, at, height in places:
        title = el("title", point.says)
        parts.append(el("path", title, d=marker, transform=f"translate({_at(at)} {_at(height)})", class_="point"))
    return el("g", *parts, class_=_colour(number))


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_at(left)} {_at(down)}" for left, down in places)


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
