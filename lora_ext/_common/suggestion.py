"""The end of a message about an unknown name: the known name that is meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" with the closest of the names ``known``, or "" if none is close to ``wrong``."""
    close = difflib.get_close_matches(wrong, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
