"""Finds the names that a path ends with and the parents it lies in, in a time independent of their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def name_covers(name: str, path: str) -> bool:
    """Returns whether ``name`` is ``path`` or its end after a dot: the rule for lists of modules."""
    return path == name or path.endswith(f".{name}")


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
        ends = (begin - 1 for begin in path_ends(path) if begin > 0)
        return path in self._paths or any(path[:end] in self._paths for end in ends)
