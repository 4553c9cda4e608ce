"""Changes files: their bytes, their JSON, or replaces them by links, pipes and directories."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.header_mutations import nested

from .choices import Choices

# Replacements of a JSON value; some are paths that lead elsewhere.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    8,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    2**31,
    2**63,
    10**400,
    "",
    "x",
    "F32",
    "(",
    "(a+)+$",
    "(?:a|a)*b" * 20,
    "\ud800",
    "\0",
    "../other",
    "/etc/passwd",
    "model.safetensors",
    "a" * 20_000,
    [],
    [None],
    [[]],
    [1, 1],
    ["a", "a"],
    ["a", 1],
    [-1],
    [0, 2**63],
    [2**62, 2**62],
    {},
    {"a": None},
    {"a": {"a": {}}},
    {"": 1},
)
_BIG: tuple[Callable[[], Any], ...] = (
    lambda: list(range(20_000)),
    lambda: ["a" * 10 + str(i) for i in range(20_000)],
    lambda: {f"a{i}": i for i in range(20_000)},
    lambda: nested(100),
    lambda: nested(100_000),
    lambda: {"k": nested(2_000)},
)
_MOST_BYTES = 1 << 21  # of a changed file


def mutate_file(choices: Choices, path: Path, others: list[Path]) -> None:
    """Changes a file in one to three ways, or replaces it."""
    if choices.chance(4):
        _replace(choices, path, others)
        return
    content = path.read_bytes()
    for _ in range(choices.between(1, 3)):
        content = _changed(choices, path, content, others)[:_MOST_BYTES]
    path.write_bytes(content)


def _replace(choices: Choices, path: Path, others: list[Path]) -> None:
    path.unlink()
    what = choices.integer(7)
    if what == 1:
        path.mkdir()
    elif what == 2:
        path.symlink_to(path.name)
    elif what == 3:
        os.mkfifo(path)  # without a writer
    elif what == 4:
        path.symlink_to("/dev/zero")
    elif what == 5:
        path.symlink_to("no-such-file")
    elif what == 6 and others:
        path.symlink_to(choices.pick(others))


def _changed(choices: Choices, path: Path, content: bytes, others: list[Path]) -> bytes:
    aware = not choices.chance(30)
    if aware and path.suffix == ".json":
        return _changed_json(choices, content)
    if aware and path.suffix == ".safetensors":
        return _changed_header(choices, content)
    return _changed_bytes(choices, content, others)


def _changed_bytes(choices: Choices, content: bytes, others: list[Path]) -> bytes:
    what, size = choices.integer(9), len(content)
    at = choices.integer(size + 1)
    length = min(choices.pick((1, 2, 8, 64, 1000)), size - at)
    if what == 0:  # flips a bit
        return content[:at] + bytes([content[at] ^ (1 << choices.integer(8))]) + content[at + 1 :] if at < size else b""
    if what == 1:
        return content[:at]
    if what == 2:
        return content[:at] + content[at + length :]
    if what == 3:
        return content[: at + length] + content[at:]  # repeats a part
    if what == 4:
        return content[:at] + bytes(choices.integer(256) for _ in range(length)) + content[at + length :]
    if what == 5:
        return content[:at] + bytes(length) + content[at + length :]
    if what == 6:
        return content + bytes(length)
    if what == 7 and others:
        other = choices.pick(others)
        return content[:at] + (other.read_bytes()[at:] if other.is_file() else b"")
    return choices.pick(
        (b"", b"\0", b"{}", b"[]", b"\xff\xfe", b"PK\x03\x04", b"{" * 50_000, b"[" * 50_000, b"\xef\xbb\xbf")
    )


def _changed_json(choices: Choices, content: bytes) -> bytes:
    try:
        value = json.loads(content)
        text = json.dumps(_changed_value(choices, value))
    except (ValueError, RecursionError):
        return _changed_bytes(choices, content, [])
    return _changed_text(choices, text).encode("utf-8", "surrogatepass")


def _changed_value(choices: Choices, value: Any) -> Any:
    """Changes one place of a JSON value."""
    if isinstance(value, dict) and value and choices.chance(85):
        key = choices.pick(list(value))
        what = choices.integer(10)
        if what == 8:
            return {k: v for k, v in value.items() if k != key}
        if what == 9:
            names = ("", "x", key + key, key.upper(), "\ud800", "__metadata__", "../x", "a.b", "0")
            return {(choices.pick(names) if k == key else k): v for k, v in value.items()}
        return {**value, key: _changed_value(choices, value[key])}
    if isinstance(value, list) and value and choices.chance(85):
        at = choices.integer(len(value))
        what = choices.integer(10)
        if what == 8:
            return value[:at] + value[at + 1 :]
        if what == 9:
            return value + value
        return [*value[:at], _changed_value(choices, value[at]), *value[at + 1 :]]
    if choices.chance(5):
        return choices.pick(_BIG)()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and choices.chance(40):
        return choices.pick((value + 1, value - 1, -value, value * 1000, str(value)))
    return choices.pick(VALUES)


def _changed_text(choices: Choices, text: str) -> str:
    """Returns JSON text, mostly unchanged; sometimes invalid, or ambiguous between readers."""
    if not choices.chance(20):
        return text
    what = choices.integer(7)
    if what == 0:  # a duplicate key
        return text.replace("{", '{"r": 1, "r": 2, ', 1)
    if what == 1:
        return "\ufeff" + text
    if what == 2:
        return text.replace(",", ",,", 1)
    if what == 3:
        return text + choices.pick((" ", "\0", "}", "// note", text))
    if what == 4:
        return text.replace('"', "'")
    if what == 5:
        return text.replace(": ", f': {"9" * 5000}, "x": ', 1)
    return text.replace('"', '"\\u0000', 1)


def _changed_header(choices: Choices, content: bytes) -> bytes:
    """Changes a safetensors file's header as JSON, its claimed length, or the data."""
    if len(content) < 8:
        return _changed_bytes(choices, content, [])
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    what = choices.integer(8)
    if what == 6:
        claimed = choices.pick((0, 1, length - 1, length + 1, length + len(data), 2**31, 100_000_001, 2**63, 2**64 - 1))
        return struct.pack("<Q", min(max(claimed, 0), 2**64 - 1)) + content[8:]
    if what == 7:
        data = choices.pick((b"", data[:-1], data + b"\0", data + data, data[::-1]))
    else:
        header = _changed_json(choices, header)
    return struct.pack("<Q", len(header)) + header + data
