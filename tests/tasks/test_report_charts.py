"""The parts that the page of ``lora-ext report`` is made of: scales, charts, maps and elements."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from lora_ext.tasks.report.heat_map import heat_map
from lora_ext.tasks.report.line_chart import Point, Series, line_chart
from lora_ext.tasks.report.markup import el, table
from lora_ext.tasks.report.scales import Scale, number_text

pytestmark = pytest.mark.cpu_only("is about files")


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([3.0, 17.5], False),
        ([-2e-5, 1e-5], False),
        ([0.31, 0.97], True),
        ([1e3, 2e7], True),
        ([5.0], False),
        ([], True),
    ],
)
def test_scales_map_values_in_order_and_mark_round_numbers(values: list[float], log: bool):
    scale = Scale([*values, math.nan, -math.inf], 100.0, 0.0, log=log)
    places = [scale(value) for value in values]
    assert all(0 < place < 100 for place in places) and places == sorted(places, reverse=True)
    assert 3 <= len(scale.ticks) <= 9 or not values
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in scale.ticks)
    if log and values:
        middle = math.sqrt(values[0] * values[1])
        assert scale(middle) == pytest.approx(sum(places) / 2)
        assert not scale.shows(0.0)
    digits = {number_text(tick).strip("-0.kMGT").replace(".", "").replace("0", "") for tick in scale.ticks}
    assert all(len(each.partition("e")[0]) <= 3 for each in digits)


def test_number_texts():
    values = {0: "0", 0.25: "0.25", 40: "40", 3e3: "3k", 2.5e6: "2.5M", -1e9: "-1G", 2e-5: "2e-05", 0.3 - 0.1: "0.2"}
    assert {value: number_text(value) for value in values} == values


def test_points_without_a_place_are_left_out():
    points = [Point(1, math.nan, "lost"), Point(2, 0.0, "zero"), Point(3, 5.0, "five", 4.0, 6.0)]
    chart = line_chart("c", [Series("s", points)], x_label="x", y_label="y", y_log=True)
    assert "five" in chart and "lost" not in chart and "zero" not in chart and "nan" not in chart.lower()


def test_a_large_map_is_a_picture_of_the_same_colours():
    small = [[i / 15 for i in range(16)]] * 16
    large = [[i / 16 for i in range(17)]] * 17
    colours = re.findall(r'fill="#(\w{6})"', heat_map("m", small, row_label="i", column_label="j"))
    assert len(colours) == 256 and (colours[0], colours[15]) == ("440154", "fde725")
    data = re.search(r"base64,([^\"]+)", heat_map("m", large, row_label="i", column_label="j"))[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.shape == (17, 17, 3) and pixels.dtype == np.uint8
    assert pixels[3, 0].tolist() == [68, 1, 84] and pixels[3, 8].tolist() == [33, 145, 140]
    assert pixels[0, 16].tolist() == [253, 231, 37]


def test_elements_escape_all_but_html():
    assert el("p", "a < b", el("b", "&"), None, class_="x", data_value='"', hidden=True) == (
        '<p class="x" data-value="&quot;" hidden>a &lt; b<b>&amp;</b></p>'
    )
    assert el("rect", x=1) == '<rect x="1"/>' and el("img", src="s") == '<img src="s">'
    assert "<td>&lt;i&gt;</td>" in table("t", ["a", "b"], [["x", "<i>"]])
