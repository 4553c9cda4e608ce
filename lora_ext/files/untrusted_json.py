"""Reads untrusted JSON: an object of bounded size and depth, or a ValueError that says what is wrong.

Unlike Python's reader, refuses repeated keys, deep nesting, lone surrogates (no file or terminal takes them) and pipes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_ext.files.regular_file import open_regular

_LARGEST_DEPTH = 64  # nesting of lists and objects; a model's config has 5
_LONGEST_INTEGER = 100  # digits: the time to parse a number grows with its length squared


def read_json_object(path: Path, caller: str, limit: int) -> dict[str, Any]:
    """Reads the JSON object in the file ``path``.

    Args:
        path: a regular file, in UTF-8.
        caller: prefix of error messages, or "".
        limit: maximum size in bytes.

    Raises:
        OSError: as ``open``.
        ValueError: the message names the file and the problem.
    """
    begin = f"{caller}: " if caller else ""
    try:
        with open_regular(path) as file:
            raw = _read(file, limit + 1)
    except ValueError as error:
        raise ValueError(f"{begin}{error}") from error
    if len(raw) > limit:
        raise ValueError(f"{begin}{path} is larger than {limit} bytes, the limit for such a file")
    return parse_json_object(raw, f"{begin}{path}")


def parse_json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Parses the JSON object in ``text``.

    Args:
        text: text of bounded size; bytes are UTF-8.
        source: prefix of error messages that says where the text is from.

    Raises:
        ValueError: it is not JSON, not an object or too deep, or has a repeated key, a number of over 100 digits, or a
            string that is not Unicode.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        values = json.loads(text, object_pairs_hook=_without_repetition, parse_int=_short_integer)
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply: it has more than {_LARGEST_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}, want an object")
    for string in _strings(values, source):
        if not string.isascii():
            try:
                string.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{source} has a string that is not Unicode: {string[:100]!r}") from None
    return values


def _read(file, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0 and (part := file.read(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _strings(values: dict[str, Any], source: str) -> Iterator[str]:
    """Yields all strings, including keys. ValueError: the nesting is too deep."""
    level: list[Any] = [values]
    for _ in range(_LARGEST_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield from value
                value = value.values()
            for inner in value:
                if isinstance(inner, str):
                    yield inner
                elif isinstance(inner, (dict, list)):
                    below.append(inner)
        if not below:
            return
        level = below
    raise ValueError(f"{source} is nested too deeply: it has more than {_LARGEST_DEPTH} levels")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return values


def _short_integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"a number has {len(digits)} digits, want at most {_LONGEST_INTEGER}")
    return int(digits)
