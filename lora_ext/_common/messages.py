"""Messages: foreign text made safe (no control characters, bounded length), lists, close names, remedies; warnings."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence

_PACKAGE = __name__.partition(".")[0]
LONGEST_NAME = 500  # characters of a tensor's name; real models use up to 100
_MOST_PROBLEMS, _LONGEST_PROBLEM = 100, 2000  # lines, characters per line


def escaped(text: str, keep: str = "") -> str:
    """Returns ``text`` with unprintable characters as backslash escapes, except those in ``keep``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(name: object, limit: int = 200) -> str:
    """Returns ``repr(name)``, cut after ``limit`` characters."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def check_name(name: str, where: str, longest: int = LONGEST_NAME) -> None:
    """Raises ValueError for the name of a tensor or file that is unprintable or too long."""
    if len(name) > longest:
        raise ValueError(f"{where} has a name of {len(name)} characters, want at most {longest}: {shown(name)}")
    if not name.isprintable():
        raise ValueError(f"{where} has a name with characters that cannot be printed: {shown(name)}")


def first_of(names: Iterable[str], count: int = 3) -> str:
    """Returns the first ``count`` names and how many others there are: models have hundreds of layers."""
    names = list(names)
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more:,} more" if more > 0 else "")


def first_lines(texts: Iterable[str], count: int = 4) -> list[str]:
    """Returns the first ``count`` texts and how many others there are, as indented lines of a report."""
    texts = list(texts)
    more = len(texts) - count
    return [f"    {text}" for text in texts[:count]] + ([f"    and {more:,} more"] if more > 0 else [])


def listed(problems: Sequence[str]) -> str:
    """Returns the problems, escaped, one per line, for the end of a message."""
    more = len(problems) - _MOST_PROBLEMS
    lines = [*problems[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {escaped(line[:_LONGEST_PROBLEM])}" for line in lines)


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" with the closest of the names ``known``, or "" if none is close to ``wrong``."""
    close = difflib.get_close_matches(wrong, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def install_hint(extra: str) -> str:
    """Returns the command that installs ``extra`` of this package."""
    return f"pip install '.[{extra}]' in a checkout of lora_ext"


def warn_user(message: str) -> None:
    """Issues a UserWarning located at the line that called into this package."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
