"""A lookup table for expressions that are names, such as ``model.layers.0.q_proj``: thousands are as fast as one.

Users mean the dots as dots, and rarely escape them. As in ``re``, an unescaped dot matches any character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SPECIAL = re.compile(r"[\^$*+?{}\[\]()]")
_ESCAPED = re.compile(r"\\[^a-zA-Z0-9]", re.DOTALL)


def are_names(source: str) -> bool:
    """Returns whether an expression is one name, or several separated by ``|``."""
    rest = _ESCAPED.sub("_", source) if "\\" in source else source
    if "\\" in rest or _SPECIAL.search(rest) is not None:
        return False
    return bool(rest) and not rest.startswith("|") and not rest.endswith("|") and "||" not in rest


class NameTable:
    """Numbered names; finds those that match a text without trying each."""

    def __init__(self) -> None:
        self._exact: dict[str, list[int]] = {}
        # Length of the name -> positions that match any character -> the other characters -> numbers.
        self._with_dots: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}

    def add(self, number: int, source: str) -> None:
        """Adds the names of an expression that :func:`are_names` accepts."""
        if "\\" not in source:
            for name in source.split("|"):
                places = tuple(i for i, character in enumerate(name) if character == ".") if "." in name else ()
                self._add(number, name, places)
            return
        text: list[str] = []
        places: list[int] = []
        for match in re.finditer(r"\\?.", source, re.DOTALL):
            character = match.group()
            if character == "|":
                self._add(number, "".join(text), tuple(places))
                text, places = [], []
                continue
            if character == ".":
                places.append(len(text))
            text.append(character[-1])
        self._add(number, "".join(text), tuple(places))

    def _add(self, number: int, text: str, places: tuple[int, ...]) -> None:
        table = self._with_dots.setdefault(len(text), {}).setdefault(places, {}) if places else self._exact
        table.setdefault(_without(text, places), []).append(number)

    def find(self, text: str) -> Iterator[int]:
        """Yields the numbers of all names that match ``text``."""
        yield from self._exact.get(text, ())
        for places, table in self._with_dots.get(len(text), {}).items():
            if (found := table.get(_without(text, places))) and not any(text[place] == "\n" for place in places):
                yield from found


def _without(text: str, places: tuple[int, ...]) -> str:
    begins, ends = (0, *(place + 1 for place in places)), (*places, len(text))
    return "".join(text[begin:end] for begin, end in zip(begins, ends, strict=True))
