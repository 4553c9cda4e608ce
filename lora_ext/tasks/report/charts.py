"""Charts of the page: lines, bars and heat maps, drawn by matplotlib.

Why matplotlib: the commands that measure bring it anyway. Its SVG needs no script, so that a chart is the same on
screen, on paper and with scripts switched off; a ``<title>`` in a mark gives the browser's own tooltip. The
alternatives, in 2026-11: Vega-Lite's interactive page carries a 0.9 MB script that compiles expressions with
``Function``, which the page's Content-Security-Policy forbids, and its static SVG takes the 84 MB of vl-convert; Plotly
and Bokeh draw nothing where scripts are off, with scripts of 1 to 5 MB; pygal has no heat maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from lora_ext.tasks.report.svg import COLOURS, give_titles, page_style, to_svg

NUM_COLOURS = 10
_MARKERS = [
    ("o", "●"),
    ("s", "■"),
    ("D", "◆"),
    ("^", "▲"),
    ("v", "▼"),
    ("P", "✚"),
    ("<", "◀"),
]  # in a chart, in a legend
_WIDTH = 400  # SVG units; text has 9 of them, and page.css sets the width on screen
_MOST_CELLS = 256  # cells of a heat map that are shapes with a title; a larger map is a picture


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption. ``legend``: a symbol and a name for each colour, in order."""

    caption: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Point:
    """``title``: the tooltip. ``low``, ``high``: ends of the error bar, or of the band around the line."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line. ``band``: shade from ``low`` to ``high`` in place of error bars."""

    name: str
    points: Sequence[Point]
    band: bool = False


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Attributes:
        parts: length and tooltip of each part; parts follow one another.
        text: the figure, as text.
        quartiles: ends of a whisker.
        colour: number of the colour, where the parts do not have one each; None: grey.
    """

    name: str
    parts: Sequence[tuple[float, str]]
    text: str
    quartiles: tuple[float, float] | None = None
    colour: int | None = None


@page_style()
def line_chart(
    caption: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
    x_ticks: Sequence[float] | None = None,
    whole_x: bool = False,
    y_from_zero: bool = False,
) -> Chart:
    """Draws points and lines. Points without a place, as on a logarithmic axis, are left out.

    Args:
        x_ticks: marks of the x axis; None: round numbers.
        whole_x: mark whole numbers only.
    """
    figure = Figure((_WIDTH / 72, 245 / 72))
    axes = figure.add_axes((0.125, 0.15, 0.86, 0.83))
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log" if x_log else "linear", yscale="log" if y_log else "linear")
    for number, one in enumerate(series):
        points = [point for point in one.points if _has_place(point.x, x_log) and _has_place(point.y, y_log)]
        rows = [(p.x, p.y, p.y if p.low is None else p.low, p.y if p.high is None else p.high) for p in points]
        x, y, low, high = np.array(rows, float).reshape(-1, 4).T
        look = {"color": _colour(number)}
        if one.band:
            axes.fill_between(x, low, high, alpha=0.16, linewidth=0, **look)
        elif (high > low).any():
            axes.errorbar(x, y, (y - low, high - y), fmt="none", linewidth=1, **look)
        axes.plot(x, y, **look)
        look |= {
            "markersize": 7 if len(points) <= 16 else 4,
            "markeredgecolor": COLOURS["ground"],
            "markeredgewidth": 0.7,
        }
        (marks,) = axes.plot(x, y, _MARKERS[number % len(_MARKERS)][0], **look)
        give_titles(marks, *(point.title for point in points))
    if y_from_zero:
        axes.set_ylim(bottom=0)
    _mark_round_numbers(axes.xaxis, x_log)
    _mark_round_numbers(axes.yaxis, y_log)
    if x_ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(x_ticks, nbins=9))
    elif whole_x and series:
        axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x1 + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    legend = [(_MARKERS[number % len(_MARKERS)][1], one.name) for number, one in enumerate(series)]
    return Chart(caption, to_svg(figure, "chart", caption), legend)


@page_style()
def bar_chart(
    caption: str, rows: Sequence[Bar], *, names: Sequence[str] = (), limit: tuple[float, str] | None = None
) -> Chart:
    """Draws bars from 0, all on one scale, with name and figure above each: long names fit on a narrow screen.

    Args:
        names: names of the parts.
        limit: a length that is marked in every row, and its tooltip.
    """
    figure = Figure((_WIDTH / 72, 24 * len(rows) / 72))
    axes = figure.add_axes((0.003, 0, 0.994, 1))
    ends = [value for row in rows for value in (sum(length for length, _ in row.parts), *(row.quartiles or ()))]
    longest = max([*filter(math.isfinite, ends), limit[0] if limit else 0.0, 0.0]) or 1.0
    axes.set(xlim=(0, longest), ylim=(len(rows), 0))
    axes.set_axis_off()
    for place, row in enumerate(rows):
        axes.text(0, place + 0.5, row.name if len(row.name) <= 52 else f"{row.name[:30]}…{row.name[-21:]}")
        axes.text(longest, place + 0.5, row.text, horizontalalignment="right")
        middle, start, height = place + 0.78, 0.0, 0.34
        axes.barh(middle, longest, height, color=COLOURS["raised"])
        for number, (length, title) in enumerate(row.parts):
            if math.isfinite(length) and length > 0:
                colour = number if names else row.colour
                shade = COLOURS["soft"] if colour is None else _colour(colour)
                give_titles(*axes.barh(middle, length, height, left=start, color=shade), title)
                start += length
        if row.quartiles:
            low, high = row.quartiles
            axes.errorbar(start, middle, xerr=[[start - low], [high - start]], color=COLOURS["ink"], linewidth=1)
    if limit is not None:
        middles = np.arange(len(rows)) + 0.78
        lines = axes.vlines([limit[0]] * len(rows), middles - 0.24, middles + 0.22, color=COLOURS["ink"])
        give_titles(lines, *[limit[1]] * len(rows))
    return Chart(caption, to_svg(figure, "bars", caption), [("■", name) for name in names])


@page_style()
def heat_map(caption: str, grid: Sequence[Sequence[float]], *, row_label: str, column_label: str) -> Chart:
    """Draws the values ``[num_rows, num_columns]`` from 0 to 1, the first row on top; rows and columns count from 1."""
    figure, values = Figure((2.6, 2.6)), np.asarray(grid, float)
    axes = figure.add_axes((0.17, 0.17, 0.8, 0.8))
    axes.grid(False)
    num_rows, num_columns = values.shape
    edges = (0.5, num_columns + 0.5, num_rows + 0.5, 0.5)
    picture = axes.imshow(values, vmin=0, vmax=1, extent=edges, aspect="auto", interpolation="none")
    if values.size <= _MOST_CELLS:  # cells over the picture, which keeps the ground from shining through between them
        columns, rows = np.arange(num_columns + 1) + 0.5, np.arange(num_rows + 1) + 0.5
        cells = axes.pcolormesh(columns, rows, values, vmin=0, vmax=1)
        give_titles(cells, *(f"({i + 1}, {j + 1}): {value:.3g}" for (i, j), value in np.ndenumerate(values)))
    else:
        give_titles(picture, f"(1, 1): {values[0, 0]:.3g}; ({num_rows}, {num_columns}): {values[-1, -1]:.3g}")
    axes.set(xlabel=column_label, ylabel=row_label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    return Chart(caption, to_svg(figure, "heat", caption))


def _has_place(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _colour(number: int) -> str:
    return COLOURS[f"c{number % NUM_COLOURS}"]


def _mark_round_numbers(axis: Axis, log: bool) -> None:
    if log:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1,) if high / low >= 1000 else (1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    units = EngFormatter(sep="")
    axis.set_major_formatter(lambda value, _: units(value) if abs(value) >= 1000 else f"{value:.4g}")
