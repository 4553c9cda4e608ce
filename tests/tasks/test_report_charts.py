"""Parts of the page of ``lora-ext report``: charts, their SVG, and tables."""

from __future__ import annotations

import base64
import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import Markup
from support.optional import Image, matplotlib

from lora_ext.tasks.report.charts import Bar, Chart, Point, Series, bar_chart, heat_map, line_chart
from lora_ext.tasks.report.page import render
from lora_ext.tasks.report.svg import COLOURS
from lora_ext.tasks.report.tables import cell, figure_text, table

pytestmark = pytest.mark.cpu_only("is about files")

HOSTILE = "$x_1$ <script>alert(1)</script> \" ' & \x00\ud800"
SHOWN = HOSTILE[:-2] + "\N{REPLACEMENT CHARACTER}" * 2


def marks(chart: Chart) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(chart.svg))


def texts(chart: Chart) -> list[str]:
    return [mark.text for mark in marks(chart) if mark.tag == "text"]


def titles(chart: Chart) -> list[str]:
    return [title.text for title in ElementTree.fromstring(chart.svg).iter("title")]


def line(points: list[Point], **options: bool) -> Chart:
    return line_chart("caption", [Series("s", points)], x_label="across", y_label="up", **options)


def read_number(text: str) -> float:
    units = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    return float(text.rstrip("kMGT")) * units.get(text[-1], 1)


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([3.0, 17.5], False),
        ([-2e-5, 1e-5], False),
        ([0.31, 0.97], True),
        ([500.0, 600.0], True),
        ([1e3, 2e7], True),
        ([5.0], False),
        ([7.0], True),
        ([2.5e12, 9e12], False),
    ],
)
def test_an_axis_marks_round_numbers(values: list[float], log: bool):
    chart = line([Point(value, 0.0, "") for value in [*values, math.nan, math.inf]], x_log=log)
    ticks = [mark for mark in marks(chart) if mark.tag == "text" and mark.get("text-anchor") == "middle"][:-2]
    found = {read_number(mark.text): float(mark.get("x")) for mark in ticks}
    assert 2 <= len(found) <= 10 and len(found) == len(ticks)
    assert [*found] == sorted(found) and [*found.values()] == sorted(found.values())
    assert all(len(re.sub(r"e.*|\D|0", "", mark.text)) <= 3 for mark in ticks)
    places = [float(mark.get("transform")[10:].split()[0]) for mark in marks(chart) if mark.find("title") is not None]
    bend = math.log if log else float
    (x0, p0), *_, (x1, p1) = found.items()
    for value, place in zip(values, places, strict=True):
        share = (bend(value) - bend(x0)) / (bend(x1) - bend(x0))
        assert place == pytest.approx(p0 + share * (p1 - p0), abs=0.5)


def test_numbers_of_an_axis_and_of_a_table():
    ticks = texts(line([Point(value, 1.0, "") for value in (0, 4000)]))
    assert {"0", "1k", "2k", "3k", "4k", "across", "up"} <= {*ticks}
    assert {"0", "0.1", "0.2", "0.3"} <= {*texts(line([Point(value, 1.0, "") for value in (0, 0.3)]))}
    shown = {None: "", True: "True", 12345: "12,345", 0.123456: "0.1235", "x": "x"}
    assert {value: figure_text(value) for value in shown} == shown


def test_points_without_a_place_are_left_out():
    points = [Point(1, math.nan, "lost"), Point(2, 0.0, "zero"), Point(3, 5.0, "five", 4.0, 6.0), Point(4, 6.0, "six")]
    chart = line(points, y_log=True)
    assert titles(chart) == ["five", "six"] and "nan" not in chart.svg.lower()
    assert titles(line([])) == [] and titles(line([], x_log=True, y_log=True)) == []


def test_every_mark_has_its_title():
    two = [Series(name, [Point(i, i, f"{name}{i}", i - 1, i + 1) for i in (1, 2)], band=name == "b") for name in "ab"]
    chart = line_chart("c", two, x_label="x", y_label="y", x_ticks=[1, 2])
    assert titles(chart) == ["a1", "a2", "b1", "b2"]
    assert chart.legend == [("●", "a"), ("■", "b")]
    filled = [mark.get("fill") for mark in marks(chart) if mark.find("title") is not None]
    assert filled == ["var(--c0)"] * 2 + ["var(--c1)"] * 2
    rows = [Bar("one", [(1.0, "first"), (math.nan, "lost"), (2.0, "last")], "3 B"), Bar("none", [(0.0, "zero")], "0 B")]
    chart = bar_chart("c", rows, names=["x", "y", "z"], limit=(4.0, "limit"))
    assert titles(chart) == ["first", "last", "limit", "limit"] and texts(chart) == ["one", "3 B", "none", "0 B"]
    timed = bar_chart("c", [Bar("step", [(2.0, "two")], "2 ms", (1.0, 4.0), colour=11)])
    assert titles(timed) == ["two"] and "var(--c1)" in timed.svg and "var(--ink)" in timed.svg


def test_a_large_map_is_a_picture_of_the_same_colours():
    small = heat_map("m", [[i / 15 for i in range(16)]] * 16, row_label="i", column_label="j")
    cells = [mark for mark in marks(small) if mark.find("title") is not None]
    assert len(cells) == 256 and (cells[0].get("fill"), cells[15].get("fill")) == ("#440154", "#fde725")
    assert titles(small)[:2] == ["(1, 1): 0", "(1, 2): 0.0667"] and titles(small)[-1] == "(16, 16): 1"
    assert {"1", "16"} & {*texts(small)} and "0" not in texts(small)
    large = heat_map("m", [[i / 16 for i in range(17)]] * 17, row_label="i", column_label="j")
    (picture,) = (mark for mark in marks(large) if mark.tag == "image")
    data = picture.get("href").removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    assert pixels.shape == (17, 17, 3)
    for place, colour in (((3, 0), [68, 1, 84]), ((3, 8), [33, 145, 140]), ((0, 16), [253, 231, 37])):
        assert abs(pixels[place].astype(int) - colour).max() <= 1
    assert titles(large) == ["(1, 1): 0; (17, 17): 1"]


def test_charts_take_colours_from_the_page_and_nothing_from_elsewhere():
    assert len({*COLOURS.values()}) == len(COLOURS) > 15, "two names of one colour cannot be told apart"

    def draw() -> list[Chart]:
        points = [Point(1.0, 2.0, HOSTILE, 1.0, 3.0), Point(2.0, 2.0, "b", 1.0, 3.0)]
        lines = line_chart(HOSTILE, [Series(HOSTILE, points)], x_label="x", y_label="y", whole_x=True)
        return [lines, bar_chart(HOSTILE, [Bar(HOSTILE, [(1.0, HOSTILE)], HOSTILE, (0.5, 2.0))], limit=(1.5, HOSTILE))]

    charts = draw()
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        assert {mark.tag for mark in root} <= {"path", "text"} and {title.tag for title in root.iter()} <= {
            "svg",
            "path",
            "text",
            "title",
        }
        names = {name for mark in root.iter() for name in mark.attrib}
        assert names <= {
            *("class", "viewBox", "role", "aria-label", "d", "x", "y", "transform", "fill", "fill-opacity"),
            *("stroke", "stroke-width", "stroke-dasharray", "text-anchor"),
        }
        assert "#" not in re.sub("&#?\\w+;", "", chart.svg), "a colour that does not follow the theme"
        assert SHOWN in [text.text for text in root.iter("title")]
        assert root.get("aria-label") == SHOWN
    before = dict(matplotlib.rcParams)
    assert draw() == charts and dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert draw() == charts


def test_templates_escape_all_but_markup():
    rows = [["x", "<i>"], [Markup("<code>{}</code>").format("<b>"), cell(1.5, "&", best=True)]]
    facts, figures = [("<dt>", '"')], table("<t>", ["a", "<h>"], rows)
    absent = dict.fromkeys(["samples", "classes", "confusion", "curve"])
    text = render("finetune.html", reading=[], facts=facts, figures=figures, own_settings={}, **absent)
    assert (
        '<td class="n">&lt;i&gt;</td>' in text
        and '<td class="n best" data-value="1.5"><strong>&amp;</strong></td>' in text
    )
    assert "<code>&lt;b&gt;</code>" in text and "<dt>&lt;dt&gt;</dt><dd>&#34;</dd>" in text
    assert 'aria-label="&lt;t&gt;"' in text and "&lt;h&gt;</th>" in text
