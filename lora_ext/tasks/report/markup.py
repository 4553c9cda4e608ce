"""HTML as strings that know they are HTML: whatever else goes into an element is escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Cell", "Html", "bullets", "cell", "count", "el", "figure_text", "join", "paragraph", "table"]

_VOID = {"img", "meta"}
_EMPTY = {"circle", "image", "line", "path", "rect"}  # of SVG, which closes elements as XML does
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # no character of an HTML document


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def _escaped(child: Any) -> str:
    return child if isinstance(child, Html) else html.escape(_NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", str(child)))


def join(children: Iterable[Any], between: str = "") -> Html:
    """The children one after the other, those that are no :class:`Html` escaped, None left out."""
    return Html(_escaped(between).join(_escaped(child) for child in children if child is not None))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element of HTML or SVG.

    Args:
        children: what is not :class:`Html` is text, and escaped; None is left out.
        attributes: ``class_`` is ``class``, other ``_`` are ``-``; None and False are left out, True has no value.
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is not None and value is not False:
            name = name.rstrip("_").replace("_", "-")
            parts.append(name if value is True else f'{name}="{_escaped(value)}"')
    start = " ".join(parts)
    if tag in _EMPTY and not children:
        return Html(f"<{start}/>")
    return Html(f"<{start}>" if tag in _VOID else f"<{start}>{join(children)}</{tag}>")


def paragraph(*sentences: str | None) -> Html | None:
    """The sentences that there are; None where there is none."""
    known = [sentence for sentence in sentences if sentence]
    return el("p", join(known, " ")) if known else None


def bullets(items: Iterable[Any]) -> Html:
    return el("ul", *(el("li", item) for item in items))


# --- numbers and tables -----------------------------------------------------------------------------------------------


class Cell:
    """A table's cell: what is shown, and the number that it is sorted by.

    Attributes:
        shown: text or :class:`Html`.
        value: None sorts last.
        best: marks it as the best beyond the spread.
    """

    def __init__(self, shown: Any, value: float | None = None, best: bool = False) -> None:
        self.shown, self.value, self.best = shown, value, best


def figure_text(value: Any) -> str:
    """A figure of unknown size to four digits; integers with separators, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def cell(value: float | None, shown: str | None = None, best: bool = False) -> Cell:
    """A number, shown as :func:`figure_text` has it unless said otherwise."""
    return Cell(figure_text(value) if shown is None else shown, value, best)


def count(number: int, what: str) -> str:
    """``1 layer``, ``2 layers``"""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def table(caption: str, heading: Sequence[Any], rows: Sequence[Sequence[Any]], *, sortable: bool = True) -> Html:
    """A table whose first column heads the rows; it scrolls by itself where the screen is narrow.

    Args:
        rows: of :class:`Cell`, text or :class:`Html`.
    """
    numeric = [any(isinstance(row[i], Cell) and row[i].value is not None for row in rows) for i in range(len(heading))]
    head = el(
        "tr",
        *(el("th", text, scope="col", class_="n" if n else None) for text, n in zip(heading, numeric, strict=True)),
    )
    body = []
    for first, *others in rows:
        cells = [_cell("th", first, numeric[0], scope="row")]
        body.append(el("tr", *cells, *(_cell("td", each, n) for each, n in zip(others, numeric[1:], strict=True))))
    content = el(
        "table",
        el("caption", caption),
        el("thead", head),
        el("tbody", *body),
        class_="sortable" if sortable and len(rows) > 1 else None,
    )
    return el("div", content, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _cell(tag: str, content: Any, numeric: bool, **attributes: Any) -> Html:
    own = content if isinstance(content, Cell) else Cell(content)
    classes = ["n"] * numeric + ["best"] * own.best
    value = None if own.value is None or not math.isfinite(own.value) else repr(own.value)
    shown = el("strong", own.shown) if own.best else own.shown
    return el(tag, shown, class_=" ".join(classes) or None, data_value=value, **attributes)
