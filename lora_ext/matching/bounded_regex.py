"""Regular expressions of configs, run by the package ``regex`` in bounded time and memory.

Python's ``re`` has no bound: one expression of ten characters in a file from somewhere runs for hours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import regex

from lora_ext._common.printable import shown
from lora_ext.matching.name_table import are_names

__all__ = ["Expression", "TimeAllowance", "TooSlow", "check_expressions"]

_LARGEST = 20_000  # characters, which take up to 0.1 s and 20 MB to compile
_COUNTED_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_SECONDS, _SECONDS_A_MATCH = 0.1, 5e-6


class TooSlow(Exception):
    """No time is left to match."""


class TimeAllowance:
    """How much time some expressions may take together: more, the more often they are tried.

    A match with the path of a layer takes a microsecond or two.
    """

    def __init__(self) -> None:
        self.left = _SECONDS


class Expression:
    """A regular expression as ``re`` has it, and whatever else ``regex`` understands.

    Raises:
        ValueError: it is not one; the message says why, not where it comes from.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._compiled = regex.compile(source, cache_pattern=False)
        except regex.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        except (RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"too deep or too large to be compiled: {error}") from None

    def match(self, text: str, allowance: TimeAllowance) -> regex.Match | None:
        """The match that begins where ``text`` does.

        Raises:
            TooSlow: there is no time left in ``allowance``, which goes down.
        """
        return self._run(self._compiled.match, text, allowance)

    def fullmatch(self, text: str, allowance: TimeAllowance) -> bool:
        """Whether ``text`` matches from its begin to its end. TooSlow: as in :meth:`match`."""
        return self._run(self._compiled.fullmatch, text, allowance) is not None

    def _run(self, match, text: str, allowance: TimeAllowance) -> regex.Match | None:
        allowance.left += _SECONDS_A_MATCH
        if allowance.left <= 0:
            raise TooSlow
        begin = time.thread_time()
        try:
            return match(text, timeout=allowance.left)
        except TimeoutError:
            raise TooSlow from None
        finally:
            allowance.left -= time.thread_time() - begin


def check_expressions(key: str, sources: Iterable[str]) -> None:
    """Checks that the expressions under ``key`` of a config are regular expressions, and not too large together.

    Raises:
        ValueError: naming the key and the expression.
    """
    size = 0
    for source in sources:
        if are_names(source):
            continue
        size += _written_out(source)
        if size > _LARGEST:
            raise ValueError(
                f"LoraConfig: {key} has too many or too long regular expressions: together, with counted repeats "
                f"({{2,4}}) written out, they have more than {_LARGEST} characters; here is {shown(source, 100)}. Use "
                "names, which may be as many as you like, or fewer and shorter ones"
            )
        try:
            Expression(source)
        except ValueError as error:
            raise ValueError(f"LoraConfig: {key} is {shown(source)}, {error}") from None


def _written_out(source: str) -> int:
    """The most characters that an expression has without counted repeats, as if each were inside of all others.

    ``regex`` writes them out as it compiles.
    """
    size = len(source)
    for bounds in _COUNTED_REPEAT.findall(source):
        size *= max(1, *(int(number[:9]) for number in bounds if number))
        if size > _LARGEST:
            break
    return size
