"""Which of many names a path ends with, and which of many parents it lies in: however many, in the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["EndTable", "Parents", "SuffixTable", "is_inside", "name_covers", "path_ends"]


def name_covers(name: str, path: str) -> bool:
    """Whether ``name`` is ``path``, or the end of it after a dot: how lists of modules match."""
    return path == name or path.endswith(f".{name}")


def is_inside(path: str, parent: str) -> bool:
    """Whether ``path`` is ``parent``, or lies below it."""
    return path == parent or path.startswith(f"{parent}.")


def path_ends(path: str) -> Iterator[int]:
    """Yields the positions where ``path`` begins, and where each part after a dot does."""
    place = 0
    while place >= 0:
        yield place
        place = path.find(".", place) + 1 or -1


class EndTable:
    """Names that a path may be, or end with after a dot."""

    def __init__(self, names: Iterable[str]) -> None:
        self._order: dict[str, int] = {}
        for name in names:
            self._order.setdefault(name, len(self._order))

    def find(self, path: str) -> list[str]:
        """Those of the names that cover ``path``, in their order."""
        found = [end for begin in path_ends(path) if (end := path[begin:]) in self._order]
        return sorted(found, key=self._order.__getitem__)

    def __contains__(self, path: str) -> bool:
        return any(path[begin:] in self._order for begin in path_ends(path))


class SuffixTable:
    """Names that a path may end with, after a dot or not."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._lengths = sorted(set(map(len, self._names)))

    def find(self, path: str) -> list[str]:
        """Those of the names that ``path`` ends with, the shortest first."""
        ends = (path[len(path) - length :] for length in self._lengths if length <= len(path))
        return [end for end in ends if end in self._names]


class Parents:
    """Paths, and all that is below them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)

    def __contains__(self, path: str) -> bool:
        """Whether ``path`` is one of them, or lies below one."""
        if path in self._paths:
            return True
        place = path.find(".")
        while place >= 0:
            if path[:place] in self._paths:
                return True
            place = path.find(".", place + 1)
        return False
