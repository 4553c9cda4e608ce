"""Changes files: their bytes, their JSON, or the header of their tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from support.header_mutations import changed, changed_text, nested

from .choices import Choices

# Replacements of a JSON value; some are paths that lead elsewhere.
_TEXTS = ("", "x", "F32", "(", "(a+)+$", "(?:a|a)*b" * 20, "\ud800", "\0", "../other", "/etc/passwd", "a" * 20_000)
_NUMBERS = (None, True, False, 0, 1, -1, 3, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**400)
_LISTS = ([], [None], [[]], [1, 1], ["a", "a"], ["a", 1], [-1], [0, 2**63], [2**62, 2**62])
_OBJECTS = ({}, {"a": None}, {"a": {"a": {}}}, {"": 1})
_BIG = (
    list(range(20_000)),
    {f"a{i}": i for i in range(20_000)},
    ["a" * 10 + str(i) for i in range(20_000)],
    nested(100),
    {"k": nested(2_000)},
)
_BYTES = (b"", b"\0", b"{}", b"[]", b"\xff\xfe", b"PK\x03\x04", b"{" * 50_000, b"[" * 50_000, b"\xef\xbb\xbf")
_MOST_BYTES = 1 << 21  # of a changed file


def mutate_file(choices: Choices, path: Path, others: list[Path]) -> None:
    """Changes a file in one to three ways; tests/hostile replaces files by pipes, devices and links."""
    content = path.read_bytes()
    for _ in range(choices.between(1, 3)):
        aware = not choices.chance(30)
        if aware and path.suffix == ".json":
            content = _changed_json(choices, content)
        elif aware and path.suffix == ".safetensors":
            content = _changed_tensors(choices, content)
        else:
            content = _changed_bytes(choices, content, others)
    path.write_bytes(content[:_MOST_BYTES])


def _changed_bytes(choices: Choices, content: bytes, others: list[Path]) -> bytes:
    at = choices.integer(len(content) + 1)
    length = min(choices.pick((1, 2, 8, 64, 1000)), len(content) - at)
    begin, part, end = content[:at], content[at : at + length], content[at + length :]
    options = (
        begin + bytes(byte ^ (1 << choices.integer(8)) for byte in part[:1]) + part[1:] + end,
        begin,
        begin + end,
        begin + part + part + end,
        begin + choices.randbytes(length) + end,
        begin + bytes(length) + end,
        content + bytes(length),
        begin + (choices.pick(others).read_bytes()[at:] if others else b""),
        choices.pick(_BYTES),
    )
    return choices.pick(options)


def _changed_json(choices: Choices, content: bytes) -> bytes:
    try:
        text = json.dumps(_changed_value(choices, json.loads(content)))
    except (ValueError, RecursionError):
        return _changed_bytes(choices, content, [])
    if choices.chance(20):
        text = choices.pick((changed_text(choices, text), text.replace("{", '{"r": 1, "r": 2, ', 1), "\ufeff" + text))
    return text.encode("utf-8", "surrogatepass")


def _changed_value(choices: Choices, value: Any) -> Any:
    """Changes one place of a JSON value."""
    if isinstance(value, dict) and value and choices.chance(85):
        key, what = choices.pick(list(value)), choices.integer(10)
        if what == 8:
            return {k: v for k, v in value.items() if k != key}
        if what == 9:
            other = choices.pick(("", "x", key + key, key.upper(), "\ud800", "__metadata__", "../x", "a.b", "0"))
            return {(other if k == key else k): v for k, v in value.items()}
        return {**value, key: _changed_value(choices, value[key])}
    if isinstance(value, list) and value and choices.chance(85):
        at, what = choices.integer(len(value)), choices.integer(10)
        if what >= 8:
            return value[:at] + value[at + 1 :] if what == 8 else value + value
        return [*value[:at], _changed_value(choices, value[at]), *value[at + 1 :]]
    if choices.chance(5):
        return choices.pick(_BIG)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and choices.chance(40):
        return choices.pick((value + 1, value - 1, -value, value * 1000, str(value)))
    return choices.pick(choices.pick((_TEXTS, _NUMBERS, _LISTS, _OBJECTS)))


def _changed_tensors(choices: Choices, content: bytes) -> bytes:
    """Changes a safetensors file's header, its claimed length, or the data."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        if choices.chance(60):
            header = json.loads(json.dumps(_changed_value(choices, header)))
        return changed(choices, dict(header), content[8 + length :])
    except (ValueError, TypeError, struct.error, RecursionError, OverflowError):  # it is no longer one, or too deep
        return _changed_bytes(choices, content, [])
