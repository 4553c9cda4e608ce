"""Matches the expressions of a config (``target_modules``, ``rank_pattern``, ...) with the paths of a model.

The rules are PEFT's. The time is bounded for any expression (:mod:`.bounded_regex`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import regex

from lora_ext.matching.bounded_regex import TimeAllowance, compiled
from lora_ext.matching.path_names import EndTable, NameTable, are_names, path_ends


class PathMatcher:
    """Matches paths with names (a path or its end after a dot) or with one regular expression (for the whole path)."""

    def __init__(self, key: str, names: Sequence[str] | str | None) -> None:
        self._ends = EndTable(() if isinstance(names, str) else names or ())
        self._table, self._expression, self._source = NameTable(), None, names
        self._allowance = TimeAllowance(key)
        if isinstance(names, str) and are_names(names):
            self._table.add(0, names)
        elif isinstance(names, str) and names:
            self._expression = compiled(names)

    def __call__(self, path: str) -> bool:
        """Returns whether ``path`` is covered. ValueError: the match takes too long."""
        if self._expression is not None:
            return self._allowance.run(self._expression.fullmatch, self._source, path) is not None
        return path in self._ends or any(True for _ in self._table.find(path))


class PathPatterns:
    """Expressions for a path or its end after a dot; the first match decides. They are compiled on first use."""

    def __init__(self, key: str, sources: Iterable[str]) -> None:
        self._key, self._sources, self._allowance = key, tuple(sources), TimeAllowance(key)

    def __reduce__(self):
        return PathPatterns, (self._key, self._sources)

    @functools.cached_property
    def _table(self) -> NameTable:
        table = NameTable()
        for number, source in enumerate(self._sources):
            if are_names(source):
                table.add(number, source)
        return table

    @functools.cached_property
    def _others(self) -> list[tuple[int, regex.Pattern]]:
        sources = [(number, source) for number, source in enumerate(self._sources) if not are_names(source)]
        return [(number, compiled(rf"(.*\.)?({source})$")) for number, source in sources]

    def first(self, path: str) -> str | None:
        """The first expression that covers ``path``, or None. ValueError: one takes too long."""
        best = next(self._matching(path), None)
        return None if best is None else self._sources[best]

    def unused(self, paths: Iterable[str]) -> list[str]:
        """The expressions that cover none of ``paths``. ValueError: one takes too long."""
        used: set[int] = set()
        for path in paths if self._sources else ():
            used.update(self._matching(path, used))
        return [source for number, source in enumerate(self._sources) if number not in used]

    def _matching(self, path: str, known: Iterable[int] = ()) -> Iterator[int]:
        """Yields the numbers of the expressions that cover ``path``, in order, except those ``known``."""
        if not self._sources:
            return
        named = sorted({number for begin in path_ends(path) for number in self._table.find(path[begin:])})
        for number, expression in self._others:
            while named and named[0] < number:
                yield named.pop(0)
            if number not in known and self._allowance.run(expression.match, self._sources[number], path):
                yield number
        yield from named


class LayerNumbers:
    """The paths that ``layers_to_transform`` accepts.

    Args:
        numbers: the layers' numbers; None or an empty list: all.
        patterns: ``layers_pattern``.
        whole: paths accepted in any layer.
    """

    def __init__(
        self, numbers: Sequence[int] | int | None, patterns: Sequence[str] | str | None, whole: Iterable[str]
    ) -> None:
        self._numbers = frozenset((numbers,) if isinstance(numbers, int) else numbers or ())
        self._whole, self._allowance = frozenset(whole), TimeAllowance("layers_pattern")
        self._expressions = [(source, compiled(source)) for source in layer_expressions(patterns)]

    def __contains__(self, path: str) -> bool:
        """Returns whether ``path`` is accepted. ValueError: an expression takes too long."""
        if not self._numbers or path in self._whole:
            return True
        for source, expression in self._expressions:
            if (found := self._allowance.run(expression.match, source, path)) is not None:
                number = found["idx"]  # None if the user's expression has an alternative without the number
                return number is not None and number.isdecimal() and int(number) in self._numbers
        return False


def as_tuple(names: Sequence[str] | str | None) -> tuple[str, ...]:
    """Converts a list, one string or None to a tuple; an empty string becomes an empty tuple."""
    return ((names,) if names else ()) if isinstance(names, str) else tuple(names or ())


def layer_expressions(patterns: Sequence[str] | str | None) -> list[str]:
    """PEFT's expressions for ``layers_pattern``. Lazy repeats find the first number: an expert's number comes later."""
    patterns = as_tuple(patterns)
    if not patterns:
        return [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    return [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
