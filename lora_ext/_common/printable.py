"""Text of others in messages: nothing that a terminal obeys, no line of its own, and not too long."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LONGEST_NAME", "check_name", "escaped", "listed", "shown"]

LONGEST_NAME = 500  # characters of a tensor's name; those of real models have up to 100
_MOST_PROBLEMS, _LONGEST_PROBLEM = 100, 2000  # lines, characters of one


def escaped(text: str, keep: str = "") -> str:
    """``text`` with backslashes in place of what cannot be printed, except the characters in ``keep``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(name: object, limit: int = 200) -> str:
    """``name`` as Python writes it, cut where it is long."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def check_name(name: str, where: str, longest: int = LONGEST_NAME) -> None:
    """ValueError for the name of a tensor or a file that cannot be printed, or that is longer than any real one."""
    if len(name) > longest:
        raise ValueError(f"{where} has a name of {len(name)} characters, want at most {longest}: {shown(name)}")
    if not name.isprintable():
        raise ValueError(f"{where} has a name with characters that cannot be printed: {shown(name)}")


def listed(problems: Sequence[str]) -> str:
    """The problems, a line each, for the end of a message; what cannot be printed in them is escaped."""
    more = len(problems) - _MOST_PROBLEMS
    lines = [*problems[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {escaped(line[:_LONGEST_PROBLEM])}" for line in lines)
