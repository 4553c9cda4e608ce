"""Expressions that are names, such as ``model.layers.0.q_proj``: thousands are looked up as fast as one.

Whoever writes them means the dots as dots, and rarely escapes them; to ``re`` they are any character, and so here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["NameTable", "are_names"]

_SPECIAL = re.compile(r"[\^$*+?{}\[\]()]")
_ESCAPED = re.compile(r"\\[^a-zA-Z0-9]", re.DOTALL)


def are_names(source: str) -> bool:
    """Whether an expression is one name, or several with ``|`` between them."""
    rest = _ESCAPED.sub("_", source) if "\\" in source else source
    if "\\" in rest or _SPECIAL.search(rest) is not None:
        return False
    return bool(rest) and not rest.startswith("|") and not rest.endswith("|") and "||" not in rest


class NameTable:
    """Names by number, of which those that a text is are found without trying each."""

    def __init__(self) -> None:
        self._exact: dict[str, list[int]] = {}
        # By length, and by the places that may be any character, by what is around those.
        self._open: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}

    def add(self, number: int, source: str) -> None:
        """Adds the names of an expression, for which :func:`are_names` holds."""
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
        table = self._open.setdefault(len(text), {}).setdefault(places, {}) if places else self._exact
        table.setdefault(_without(text, places), []).append(number)

    def find(self, text: str) -> Iterator[int]:
        """The numbers of all names that ``text`` is."""
        yield from self._exact.get(text, ())
        for places, table in self._open.get(len(text), {}).items():
            if (found := table.get(_without(text, places))) and not any(text[place] == "\n" for place in places):
                yield from found


def _without(text: str, places: tuple[int, ...]) -> str:
    begins, ends = (0, *(place + 1 for place in places)), (*places, len(text))
    return "".join(text[begin:end] for begin, end in zip(begins, ends, strict=True))
