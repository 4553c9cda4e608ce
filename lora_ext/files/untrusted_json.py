"""Reading JSON that somebody else wrote: an object of bounded size and depth, or a ValueError that says what is wrong.

Python's reader takes the last of two equal keys, any depth up to its own stack's, lone surrogates that no file or
terminal takes, and waits for a pipe. All of these are refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_ext.files.regular_file import open_regular

__all__ = ["parse_json_object", "read_json_object"]

_LARGEST_DEPTH = 64  # of lists and objects in each other; a model's config has 5
_LONGEST_INTEGER = 100  # digits: reading a number takes time that grows with the square of its length


def read_json_object(path: Path, caller: str, limit: int) -> dict[str, Any]:
    """Returns the JSON object in the file ``path``.

    Args:
        path: a regular file, in UTF-8.
        caller: begins the messages; "" for none.
        limit: most bytes that the file may have.

    Raises:
        OSError: as ``open``; FileNotFoundError among them.
        ValueError: naming the file and what is wrong with it.
    """
    begin = f"{caller}: " if caller else ""
    try:
        with open_regular(path) as file:
            raw = _read(file, limit + 1)
    except ValueError as error:
        raise ValueError(f"{begin}{error}") from error
    if len(raw) > limit:
        raise ValueError(f"{begin}{path} is larger than {limit} bytes, the most that is read of such a file")
    return parse_json_object(raw, f"{begin}{path}")


def parse_json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Returns the JSON object in ``text``.

    Args:
        text: of bounded size; bytes are UTF-8.
        source: begins the messages: says where the text is from.

    Raises:
        ValueError: it is not JSON, no object, too deep, or has a key twice, a number of over 100 digits, or a string
            that is not Unicode.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        values = json.loads(text, object_pairs_hook=_without_repetition, parse_int=_short_integer)
    except RecursionError:
        raise ValueError(f"{source} is not JSON that is read here: it has more than {_LARGEST_DEPTH} levels") from None
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
    """All strings, keys included. ValueError where they lie too deep."""
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
    raise ValueError(f"{source} is not JSON that is read here: it has more than {_LARGEST_DEPTH} levels")


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
