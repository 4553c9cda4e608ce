"""Matches the expressions of a config (``target_modules``, ``rank_pattern``, ...) with the paths of a model.

The rules are PEFT's. The time is bounded for any expression (:mod:`.bounded_regex`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from lora_ext._common.printable import shown
from lora_ext.matching.bounded_regex import Expression, TimeAllowance, TooSlow
from lora_ext.matching.name_table import NameTable, are_names
from lora_ext.matching.path_names import EndTable, path_ends


@contextmanager
def _bounded(key: str, source: str, path: str) -> Iterator[None]:
    try:
        yield
    except TooSlow:
        raise ValueError(
            f"LoraConfig: {key} has the expression {shown(source)}, which takes too long to match paths such as "
            f"{path!r}; use fewer repeats and none inside another, or use names"
        ) from None


class PathMatcher:
    """Matches paths with names (a path or its end after a dot) or with one regular expression (for the whole path)."""

    def __init__(self, key: str, names: Sequence[str] | str | None) -> None:
        self._key = key
        self._ends, self._table, self._expression = EndTable(()), NameTable(), None
        if not isinstance(names, str):
            self._ends = EndTable(names or ())
        elif are_names(names):
            self._table.add(0, names)
        elif names:
            self._expression, self._allowance = Expression(names), TimeAllowance()

    def __call__(self, path: str) -> bool:
        """Returns whether ``path`` is covered. ValueError: the match takes too long."""
        if self._expression is not None:
            with _bounded(self._key, self._expression.source, path):
                return self._expression.fullmatch(path, self._allowance)
        return path in self._ends or any(True for _ in self._table.find(path))


class PathPatterns:
    """Expressions for a path or its end after a dot; the first match decides. They are compiled on first use."""

    def __init__(self, key: str, sources: Iterable[str]) -> None:
        self._key, self._sources, self._is_ready = key, tuple(sources), False

    def __reduce__(self):
        return PathPatterns, (self._key, self._sources)

    def _prepare(self) -> None:
        self._allowance, self._table = TimeAllowance(), NameTable()
        self._others: list[tuple[int, Expression]] = []
        for number, source in enumerate(self._sources):
            if are_names(source):
                self._table.add(number, source)
            else:
                self._others.append((number, Expression(rf"(.*\.)?({source})$")))
        self._is_ready = True

    def first(self, path: str) -> str | None:
        """The first expression that covers ``path``, or None. ValueError: one takes too long."""
        if not self._sources:
            return None
        best = min(self._named(path), default=len(self._sources))
        for number, expression in self._others:
            if number > best:
                break
            if self._covers(number, expression, path):
                best = number
                break
        return self._sources[best] if best < len(self._sources) else None

    def unused(self, paths: Iterable[str]) -> list[str]:
        """The expressions that cover none of ``paths``. ValueError: one takes too long."""
        used: set[int] = set()
        for path in paths if self._sources else ():
            used.update(self._named(path))
            used.update(n for n, expression in self._others if n not in used and self._covers(n, expression, path))
        return [source for number, source in enumerate(self._sources) if number not in used]

    def _named(self, path: str) -> Iterator[int]:
        if not self._is_ready:
            self._prepare()
        for begin in path_ends(path):
            yield from self._table.find(path[begin:])

    def _covers(self, number: int, expression: Expression, path: str) -> bool:
        with _bounded(self._key, self._sources[number], path):
            return expression.match(path, self._allowance) is not None


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
        self._numbers = (
            None if numbers is None or numbers == () else frozenset((numbers,) if isinstance(numbers, int) else numbers)
        )
        self._whole, self._allowance = frozenset(whole), TimeAllowance()
        self._expressions = [Expression(source) for source in layer_expressions(patterns)]

    def __contains__(self, path: str) -> bool:
        """Returns whether ``path`` is accepted. ValueError: an expression takes too long."""
        if self._numbers is None or path in self._whole:
            return True
        for expression in self._expressions:
            with _bounded("layers_pattern", expression.source, path):
                found = expression.match(path, self._allowance)
            if found is not None:
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
