"""Finds the names that a path ends with and the parents it lies in, in a time independent of their number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_SPECIAL = re.compile(r"[\\^$*+?{}\[\]()]")
_ESCAPED = re.compile(r"\\(\W)")


def path_ends(path: str) -> Iterator[str]:
    """Yields ``path`` and its ends after each dot, the longest first."""
    while path:
        yield path
        path = path.partition(".")[2]


def plain_names(source: str) -> list[str]:
    """Returns the names that an expression lists with ``|`` in between (dots are dots); none if it is no such list."""
    rest = _ESCAPED.sub("", source)
    if _SPECIAL.search(rest) or len(rest.split("|")) != len(names := source.split("|")) or "" in names:
        return []
    return [_ESCAPED.sub(r"\1", name) for name in names]


class EndTable:
    """A set of names that can equal a path or its end after a dot."""

    def __init__(self, names: Iterable[str]) -> None:
        self._order: dict[str, int] = {}
        for name in names:
            self._order.setdefault(name, len(self._order))

    def find(self, path: str) -> list[str]:
        """The names that cover ``path``, in the order given."""
        return sorted((end for end in path_ends(path) if end in self._order), key=self._order.__getitem__)

    def __contains__(self, path: str) -> bool:
        return any(end in self._order for end in path_ends(path))


class Parents:
    """A set of paths and everything below them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)

    def __contains__(self, path: str) -> bool:
        """Returns whether ``path`` is one of the paths or below one."""
        while path and path not in self._paths:
            path = path.rpartition(".")[0]
        return path in self._paths
