"""Runs the regular expressions of configs with the package ``regex``, in bounded time and memory.

Python's ``re`` has no bound: one expression of ten characters in an untrusted file can run for hours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import regex

from lora_ext._common.printable import shown
from lora_ext.matching.path_names import plain_names

_LARGEST = 10_000  # characters
_COUNTED_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_SECONDS, _SECONDS_A_MATCH = 0.1, 5e-6  # matching one layer's path takes one or two microseconds


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
