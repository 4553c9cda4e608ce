"""Findings of a call, and how its exception is judged."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_OURS = (ValueError, TypeError, KeyError, RuntimeError, MemoryError)
_NEVER = re.compile(
    r"INTERNAL ASSERT|API call failed|[Rr]eport a bug|report this|std::|bad_alloc|Traceback|NoneType' object has no"
)
# Messages of PyTorch and Python that need no name: memory, inference tensors, devices, odd paths.
_CLEAR = re.compile(
    r"can't allocate memory: you tried to allocate|Storage size calculation overflowed|Overflow when unpa|"
    r"its data is not allocated yet|Inference tensors cannot be saved for backward|"
    r"are out of bounds for storage of size|"
    r"cannot be represented as a SymInt|Device (string|index) must|error unpacking string as utf-8|embedded null byte"
)


class CannotTell(Exception):
    """Raised by an oracle that has nothing to compare with for these arguments."""


class WrongResult(Exception):
    """Raised if a result differs from the formula's."""


@dataclass(frozen=True)
class Finding:
    """Something that must not happen.

    Attributes:
        kind: crash, hang, wrong result, uninitialised, wrong exception, unclear message, changed argument ...
        function: the called function.
        signature: equal for findings with the same cause.
        detail: the message, with values.
    """

    kind: str
    function: str
    signature: str
    detail: str


def finding(kind: str, function: str, detail: str, place: str = "") -> Finding:
    words = re.sub(
        r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b", "#", detail.splitlines()[0][:160] if detail else ""
    )
    words = re.sub(r"#([,\s]+#)+", "#", words)
    return Finding(kind, function, f"{kind}: {function}: {place or words}", detail[:2000])


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: refused, compared, accepted (not compared) or void (its arguments cannot be made)."""

    kind: str
    findings: Sequence[Finding] = ()


def judge_exception(function: str, names: Sequence[str], error: Exception) -> list[Finding]:
    """Returns a finding unless the exception has a documented type and a message with one of ``names``."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or type(error) is MemoryError or _CLEAR.search(text):
        return []
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "/lora_ext/" in f.filename), frames[-1])
    place = f"{type(error).__name__} in {last.filename.rpartition('/lora_ext/')[2]}:{last.name}"
    described = f"{type(error).__name__}: {text}"
    if not isinstance(error, _OURS) or isinstance(error, (UnicodeError, RecursionError)):
        return [finding("wrong exception", function, described, place)]
    if _NEVER.search(text):
        return [finding("unclear message", function, described)]
    if not any(re.search(rf"\b{re.escape(name)}", text) for name in names):
        return [finding("unclear message", function, described, place)]
    return []
