"""Raises refusals with the texts of csrc/refusals.h, which the compiled ops and the checks in Python share."""

from __future__ import annotations

import re

from lora_ext import _load

_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}
_REFUSALS = {name: (_ERRORS[error], text) for name, (error, text) in _load.refusals().items()}


def refusal(op: str, name: str, *parts: object) -> Exception:
    """Returns the exception for a refusal of csrc/refusals.h. ``parts`` replace the ``{}`` of its text, in order."""
    error, text = _REFUSALS[name]
    return error(f"{op}: {text.format(*parts)}")


def refusal_of_op(error: Exception, caller: str | None = None) -> Exception | None:
    """Returns the exception for a refusal that a compiled op raised as a RuntimeError; None for any other error.

    ``caller``: the function to name in place of the op.
    """
    for kind, text in _REFUSALS.values():
        pattern = ".*".join(re.escape(part) for part in text.split("{}"))
        if refused := re.fullmatch(rf"(\w+): ({pattern})", str(error), re.DOTALL):
            return kind(f"{caller or refused[1]}: {refused[2]}")
    return None
