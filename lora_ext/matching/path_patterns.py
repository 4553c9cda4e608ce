"""Matches the names and expressions of a config (``target_modules``, ``rank_pattern``, ...) with a model's paths.

The rules are PEFT's. The time is bounded for any expression (:mod:`.bounded_regex`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from lora_ext.matching.bounded_regex import TimeAllowance, compiled
from lora_ext.matching.path_names import EndTable, path_ends, plain_names


class PathMatcher:
    """Matches paths with names (a path or its end after a dot) or with one regular expression (for the whole path)."""

    def __init__(self, key: str, names: Sequence[str] | str | None) -> None:
        self._source, self._allowance = names, TimeAllowance(key)
        self._names, self._expression = EndTable(names or ()), None
        if isinstance(names, str):
            self._names = frozenset(plain_names(names))
            self._expression = compiled(names) if names and not self._names else None

    def __call__(self, path: str) -> bool:
        """Returns whether ``path`` is covered. ValueError: the match takes too long."""
        if self._expression is None:
            return path in self._names
        return self._allowance.run(self._expression.fullmatch, self._source, path) is not None


class PathPatterns:
    """Expressions for a path or its end after a dot; the first match decides.

    PEFT takes names for expressions, too, in which a dot is any character; here it is a dot.
    """

    def __init__(self, key: str, sources: Iterable[str]) -> None:
        self._sources, self._allowance = tuple(sources), TimeAllowance(key)
        self._numbers: dict[str, list[int]] = defaultdict(list)
        self._expressions = []
        for number, source in enumerate(self._sources):
            names = plain_names(source)
            for name in names:
                self._numbers[name].append(number)
            if not names:
                self._expressions.append((number, compiled(rf"(.*\.)?({source})$")))

    def first(self, path: str) -> str | None:
        """The first expression that covers ``path``, or None. ValueError: one takes too long."""
        return next((self._sources[number] for number in self._covering(path)), None)

    def unused(self, paths: Iterable[str]) -> list[str]:
        """The expressions that cover none of ``paths``. ValueError: one takes too long."""
        used = {number for path in paths for number in self._covering(path)}
        return [source for number, source in enumerate(self._sources) if number not in used]

    def _covering(self, path: str) -> Iterator[int]:
        """Yields the numbers of the sources that cover ``path``, in order."""
        named = sorted({number for end in path_ends(path) for number in self._numbers.get(end, ())})
        for number, expression in self._expressions:
            while named and named[0] < number:
                yield named.pop(0)
            if self._allowance.run(expression.match, self._sources[number], path) is not None:
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
