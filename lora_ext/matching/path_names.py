"""Finds the names that a path ends with and the parents it lies in, in a time independent of their number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_SPECIAL = re.compile(r"[\\^$*+?{}\[\]()]")
_ESCAPED = re.compile(r"\\[^\w|]")


def is_inside(path: str, parent: str) -> bool:
    """Returns whether ``path`` is ``parent`` or below it."""
    return path == parent or path.startswith(f"{parent}.")


def path_ends(path: str) -> Iterator[int]:
    """Yields the start positions of the ends of ``path``: 0, and the position after each dot."""
    place = 0
    while place >= 0:
        yield place
        place = path.find(".", place) + 1 or -1


class EndTable:
    """A set of names that can equal a path or its end after a dot."""

    def __init__(self, names: Iterable[str]) -> None:
        self._order: dict[str, int] = {}
        for name in names:
            self._order.setdefault(name, len(self._order))

    def find(self, path: str) -> list[str]:
        """The names that cover ``path``, in the order given."""
        found = [end for begin in path_ends(path) if (end := path[begin:]) in self._order]
        return sorted(found, key=self._order.__getitem__)

    def __contains__(self, path: str) -> bool:
        return any(path[begin:] in self._order for begin in path_ends(path))


class SuffixTable:
    """A set of names that a path can end with, after a dot or not."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._lengths = sorted(set(map(len, self._names)))

    def find(self, path: str) -> list[str]:
        """The names that ``path`` ends with, the shortest first."""
        ends = (path[len(path) - length :] for length in self._lengths if length <= len(path))
        return [end for end in ends if end in self._names]


class Parents:
    """A set of paths and everything below them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)

    def __contains__(self, path: str) -> bool:
        """Returns whether ``path`` is one of the paths or below one."""
        return path in self._paths or any(path[: begin - 1] in self._paths for begin in path_ends(path) if begin)


def are_names(source: str) -> bool:
    """Returns whether an expression is one name, or several separated by ``|``."""
    rest = _ESCAPED.sub("_", source)
    return _SPECIAL.search(rest) is None and "" not in rest.split("|")


class NameTable:
    """Numbered expressions that are names; finds those that match a text without trying each: there are thousands.

    Users mean the dots as dots, and rarely escape them; but, as in ``re``, such a dot matches any character.
    """

    def __init__(self) -> None:
        # Length of the name -> places that match any character -> the other characters -> numbers.
        self._tables: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}

    def add(self, number: int, source: str) -> None:
        """Adds the names of an expression that :func:`are_names` accepts."""
        for name in source.split("|"):
            characters = re.findall(r"\\?.", name, re.DOTALL) if "\\" in name else name
            dots = tuple(i for i, character in enumerate(characters) if character == ".")
            text = "".join(character[-1] for character in characters) if "\\" in name else name
            table = self._tables.setdefault(len(text), {}).setdefault(dots, {})
            table.setdefault(_without(text, dots), []).append(number)

    def find(self, text: str) -> Iterator[int]:
        """Yields the numbers of all names that match ``text``."""
        for dots, table in self._tables.get(len(text), {}).items():
            if (found := table.get(_without(text, dots))) and not any(text[place] == "\n" for place in dots):
                yield from found


def _without(text: str, places: tuple[int, ...]) -> str:
    if not places:
        return text
    begins, ends = (0, *(place + 1 for place in places)), (*places, len(text))
    return "".join(text[begin:end] for begin, end in zip(begins, ends, strict=True))
