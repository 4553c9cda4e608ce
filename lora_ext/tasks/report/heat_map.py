"""A grid of values from 0 to 1 as colours."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

from lora_ext.tasks.report.line_chart import figure
from lora_ext.tasks.report.markup import Html, el

__all__ = ["colour_scale", "heat_map", "png"]

_ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis at quarters
_SIDE, _LEFT, _TOP, _BOTTOM = 200, 46, 8, 44
_MOST_CELLS = 256  # that are shapes with a text each; a larger grid is a picture


def heat_map(caption: str, grid: Sequence[Sequence[float]], *, row_label: str, column_label: str) -> Html:
    """The values ``[num_rows, num_columns]``, first row on top; rows and columns are counted from 1."""
    num_rows, num_columns = len(grid), len(grid[0])
    width, height = _LEFT + _SIDE + 8, _TOP + _SIDE + _BOTTOM
    drawing = el(
        "svg",
        el("title", f"{caption}. {_corners(grid)}"),
        _cells(grid),
        *_ticks(num_rows, num_columns),
        el("text", column_label, x=_LEFT + _SIDE / 2, y=height - 8, class_="middle label"),
        el("text", row_label, transform=f"translate(14 {_TOP + _SIDE / 2}) rotate(-90)", class_="middle label"),
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_="heat",
    )
    return figure(caption, drawing)


def colour_scale() -> Html:
    """What the colours mean."""
    image = el("img", src=_data_uri([[i / 127 for i in range(128)]]), alt="the colours from 0 to 1", class_="scale")
    return el("p", "0 ", image, " 1", class_="scale")


def _cells(grid: Sequence[Sequence[float]]) -> Html:
    num_rows, num_columns = len(grid), len(grid[0])
    if num_rows * num_columns > _MOST_CELLS:
        box = {"x": _LEFT, "y": _TOP, "width": _SIDE, "height": _SIDE}
        return el("image", href=_data_uri(grid), preserveAspectRatio="none", class_="pixels", **box)
    wide, high = _SIDE / num_columns, _SIDE / num_rows
    overlap = 0.4  # with the next one, which is drawn over it: else the ground may shine through between them
    shapes = []
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            red, green, blue = _colour(value)
            shapes.append(
                el(
                    "rect",
                    el("title", f"({i + 1}, {j + 1}): {value:.3g}"),
                    x=f"{_LEFT + j * wide:.2f}",
                    y=f"{_TOP + i * high:.2f}",
                    width=f"{wide + overlap * (j + 1 < num_columns):.2f}",
                    height=f"{high + overlap * (i + 1 < num_rows):.2f}",
                    fill=f"#{red:02x}{green:02x}{blue:02x}",
                )
            )
    return el("g", *shapes, class_="cells")


def _ticks(num_rows: int, num_columns: int) -> list[Html]:
    """At most eight a side, from the first on."""
    parts = []
    for i in range(0, num_rows, math.ceil(num_rows / 8)):
        place = _TOP + (i + 0.5) * _SIDE / num_rows
        parts.append(el("text", str(i + 1), x=_LEFT - 6, y=f"{place:.1f}", dy="0.35em", class_="end"))
    for j in range(0, num_columns, math.ceil(num_columns / 8)):
        place = _LEFT + (j + 0.5) * _SIDE / num_columns
        parts.append(el("text", str(j + 1), x=f"{place:.1f}", y=_TOP + _SIDE + 15, class_="middle"))
    return parts


def _corners(grid: Sequence[Sequence[float]]) -> str:
    return f"(1, 1): {grid[0][0]:.3g}; ({len(grid)}, {len(grid[0])}): {grid[-1][-1]:.3g}"


def _colour(value: float) -> tuple[int, ...]:
    place = min(max(value, 0.0), 1.0) * (len(_ANCHORS) - 1)
    lower = min(int(place), len(_ANCHORS) - 2)
    part = place - lower
    return tuple(round(a + part * (b - a)) for a, b in zip(_ANCHORS[lower], _ANCHORS[lower + 1], strict=True))


def _data_uri(grid: Sequence[Sequence[float]]) -> str:
    rows = [bytes(channel for value in row for channel in _colour(value)) for row in grid]
    return "data:image/png;base64," + base64.b64encode(png(rows)).decode()


def png(rows: Sequence[bytes]) -> bytes:
    """A PNG file (ISO/IEC 15948) of 8-bit RGB pixels, three bytes each, row by row."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
