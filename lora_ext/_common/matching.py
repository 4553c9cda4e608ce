"""Matches the names and expressions of a config (``target_modules``, ``rank_pattern``, ...) with a model's paths.

The rules are PEFT's. Regular expressions run in the package ``regex``, in bounded time and memory: Python's ``re`` has
no bound, and one expression of ten characters in an untrusted file can run for hours. Names are looked up, in a time
independent of their number.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import regex

from lora_ext._common.messages import shown

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig

_SPECIAL = re.compile(r"[\\^$*+?{}\[\]()]")
_ESCAPED = re.compile(r"\\(\W)")
_LARGEST = 10_000  # characters
_COUNTED_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_SECONDS, _SECONDS_A_MATCH = 0.1, 5e-6  # matching one layer's path takes one or two microseconds


# --- names ------------------------------------------------------------------------------------------------------------


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


# --- regular expressions ----------------------------------------------------------------------------------------------


def compiled(source: str) -> regex.Pattern:
    """Compiles an expression in the syntax of ``regex``, which includes that of ``re``.

    ValueError: ``source`` is not one; the message says why, but not where it comes from.
    """
    try:
        return regex.compile(source, cache_pattern=False)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"not a regular expression that can be compiled: {error}") from None


class TimeAllowance:
    """The time that the expressions under one key of a config may take together. It grows with every match."""

    def __init__(self, key: str) -> None:
        self._key, self.seconds = key, _SECONDS

    def run(self, match: Callable[..., regex.Match | None], source: str, path: str) -> regex.Match | None:
        """Returns ``match(path)``, for a method of the compiled ``source``. ValueError: the time is used up."""
        self.seconds += _SECONDS_A_MATCH
        begin = time.thread_time()
        try:
            if self.seconds <= 0:
                raise TimeoutError
            found = match(path, timeout=self.seconds)
        except TimeoutError:  # by the library's clock, which also counts the process's other threads
            self.seconds = -1.0
            raise ValueError(
                f"LoraConfig: {self._key} has the expression {shown(source)}, which takes too long to match paths such "
                f"as {path!r}; use fewer repeats and none inside another, or use names"
            ) from None
        self.seconds -= time.thread_time() - begin
        return found


def check_expressions(key: str, sources: Iterable[str]) -> None:
    """Checks that the expressions under ``key`` of a config are valid, and together not too long. Names may be long.

    ValueError: the message names the key and the expression.
    """
    size = 0
    for source in sources:
        if plain_names(source):
            continue
        size += _written_out(source)
        if size > _LARGEST:
            raise ValueError(
                f"LoraConfig: {key} has too many or too long regular expressions: with counted repeats ({{2,4}}) "
                f"expanded they exceed {_LARGEST} characters at {shown(source, 100)}; use names"
            )
        try:
            compiled(source)
        except ValueError as error:
            raise ValueError(f"LoraConfig: {key} is {shown(source)}, {error}") from None


def _written_out(source: str) -> int:
    """An upper bound for the length of an expression as ``regex`` compiles it: with counted repeats expanded."""
    size = len(source)
    for bounds in _COUNTED_REPEAT.findall(source):
        size *= max(1, *(int(number[:9]) for number in bounds if number))
        if size > _LARGEST:
            break
    return size


# --- the keys of a config ---------------------------------------------------------------------------------------------


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
        covering = self._covering(path)
        return self._sources[min(covering)] if covering else None

    def unused(self, paths: Iterable[str]) -> list[str]:
        """The expressions that cover none of ``paths``. ValueError: one takes too long."""
        used = set().union(*map(self._covering, paths))
        return [source for number, source in enumerate(self._sources) if number not in used]

    def _covering(self, path: str) -> set[int]:
        """Returns the numbers of the sources that cover ``path``."""
        run, found = self._allowance.run, [number for end in path_ends(path) for number in self._numbers.get(end, ())]
        return {*found, *(i for i, e in self._expressions if run(e.match, self._sources[i], path) is not None)}


class LayerNumbers:
    """The paths that ``layers_to_transform`` accepts. Whole paths in ``target_modules`` count in any layer."""

    def __init__(self, config: LoraConfig) -> None:
        numbers, targets = config.layers_to_transform, config.target_modules
        self._numbers = frozenset((numbers,) if isinstance(numbers, int) else numbers or ())
        self._whole = frozenset(() if isinstance(targets, str) else targets or ())
        self._allowance = TimeAllowance("layers_pattern")
        self._expressions = [(source, compiled(source)) for source in layer_expressions(config.layers_pattern)]

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
