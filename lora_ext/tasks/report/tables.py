"""Tables and texts of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # no character of an HTML document


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        value: the number that the cell is sorted by; None sorts last.
        best: marked as the best.
        share: shades the cell, from 0 (the page's ground) to 1; None: no shade.
    """

    shown: str
    value: float | None
    best: bool
    share: float | None = None

    @property
    def sort_key(self) -> str | None:
        return None if self.value is None or not math.isfinite(self.value) else repr(self.value)

    @property
    def shade(self) -> str:
        """The class of the cell's shade in page.css, one of six; "" for none."""
        return "" if self.share is None else f"s{round(5 * min(max(self.share, 0.0), 1.0))}"


@dataclass(frozen=True)
class Table:
    """A table whose first column heads the rows. ``numeric``: for each column, whether it holds numbers."""

    caption: str
    heading: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[bool]


def table(caption: str, heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Makes a table of rows of :class:`Cell`, or of values that :func:`cell` shows."""
    cells = [[value if isinstance(value, Cell) else cell(value) for value in row] for row in rows]
    return Table(caption, heading, cells, [any(row[i].value is not None for row in cells) for i in range(len(heading))])


def cell(value: Any, shown: str | None = None, best: bool = False, share: float | None = None) -> Cell:
    """Makes a cell of a number, text, Markup or None, shown by :func:`figure_text` unless ``shown`` is given."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(figure_text(value) if shown is None else shown, value if is_number else None, best, share)


def figure_text(value: Any) -> str:
    """Formats a number with four digits, an integer with separators, None as nothing, other values as text."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def count(number: int, noun: str) -> str:
    """Returns ``1 layer``, ``2 layers``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: Any) -> str:
    """Returns the text; characters that HTML does not allow become U+FFFD."""
    return _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", str(text))
