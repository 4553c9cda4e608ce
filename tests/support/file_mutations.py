"""Changes files from a seed: their bytes, their JSON, or the header of their tensors."""

from __future__ import annotations

import json
import math
import random
import re
import struct
from typing import Any

# Replacements of a word of JSON text; some are no JSON.
WORDS = ["-0", "0", "-1", "1.0", "1e0", "1E2", "2e", "01", "0x1", "+1", "1_0", "4", "1e999"]
WORDS += ["NaN", "Infinity", "-Infinity", str(2**62), str(2**63), str(2**64 - 1), str(2**64)]
WORDS += ["9" * digits for digits in (18, 19, 20, 40, 5000)]
WORDS += ["null", "true", "[]", "{}", '""', '"F32"', '{"F32":null}', "[1]", "[[1]]", '[{"a":1}]', '"1"', "[0,8]"]
WORDS += ['"\\ud800"', '"\\ud83d\\ude00"', '"\\udc00\\ud800"', '"\\u0000"', '"\n"', '"\\x"', "'a'", '"\\/"']
SPACES = [" ", "\n", "\t", "\r", "\u00a0", "\ufeff", "\f", "\0", "/**/", ","]
FIELDS = ['"dtype":"F32",', '"shape":[2],', '"data_offsets":[0,8],', '"extra":1,', '"__metadata__":{},', '"r":1,"r":2,']


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# Replacements of a JSON value; some are paths that lead elsewhere.
TEXTS = ["", "x", "F32", "f32", "F12", "I4", "(", "(a+)+$", "(?:a|a)*b" * 20, "\ud800", "\0", "../other", "/etc/passwd"]
TEXTS += ["a" * 20_000]
NUMBERS = [None, True, False, 0, 1, -1, 3, 8, 0.5, 1e308, math.nan, math.inf, 2**31, 2**62, 2**63, 2**64, 10**400]
LISTS = [[], [None], [[]], [1, 1], ["a", "a"], ["a", 1], [-1], [0, 8], [8, 0], [2.0], [0, 2**63], [2**62, 2**62, 0]]
OBJECTS = [{}, {"a": None}, {"a": 1}, {"a": {"a": {}}}, {"": 1}, {"F32": None}, {"F32": 1, "U8": None}]
BIG = [list(range(20_000)), {f"a{i}": i for i in range(20_000)}, nested(100), nested(200), {"k": nested(2_000)}]
KEYS = ["", "x", "\ud800", "__metadata__", "../x", "a.b", "0", "Dtype"]
BYTES = [b"", b"\0", b"{}", b"[]", b"\xff\xfe", b"PK\x03\x04", b"{" * 50_000, b"[" * 50_000, b"\xef\xbb\xbf"]
MOST_BYTES = 1 << 21  # of a changed file


def mutated(rng: random.Random, suffix: str, content: bytes, others: list[bytes]) -> bytes:
    """Changes the content of a file in one to three ways. ``others``: contents of other files."""
    for _ in range(rng.randint(1, 3)):
        aware = rng.random() < 0.7
        if aware and suffix == ".json":
            content = _changed_json(rng, content)
        elif aware and suffix == ".safetensors":
            content = _changed_tensors(rng, content)
        else:
            content = _changed_bytes(rng, content, others)
    return content[:MOST_BYTES]


def _with_changes(rng: random.Random, header: Any, data: bytes) -> bytes:
    """Makes a file of a header, with zero to some changes in its values and its text, and the data of its tensors."""
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        header = _changed_value(rng, header)
    style = {"ensure_ascii": rng.random() < 0.5, "separators": rng.choice([(",", ":"), (", ", ": ")])}
    try:
        text = json.dumps(header, **style)
    except RecursionError:  # Python writes no deeper ones
        text = "[" * 2_000 + "]" * 2_000
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        text = _changed_text(rng, text)
    raw = text.encode("utf-8", "surrogatepass")
    if raw and rng.random() < 0.15:
        at = rng.randrange(len(raw))
        raw = raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
    length = len(raw)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, 7, length - 1, length + 1, length + len(data), 2**31, 100_000_001, 2**63, 2**64 - 1])
    if rng.random() < 0.1:
        data = rng.choice([data[:-1], data + b"\0", data + data, b""])
    content = struct.pack("<Q", max(length, 0)) + raw + data
    return content[: rng.randrange(len(content))] if rng.random() < 0.03 else content


def _changed_bytes(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    length = min(rng.choice((1, 2, 8, 64, 1000)), len(content) - at)
    begin, part, end = content[:at], content[at : at + length], content[at + length :]
    options = (
        begin + bytes(byte ^ (1 << rng.randrange(8)) for byte in part[:1]) + part[1:] + end,
        begin,
        begin + end,
        begin + part + part + end,
        begin + rng.randbytes(length) + end,
        begin + bytes(length) + end,
        content + bytes(length),
        begin + (rng.choice(others)[at:] if others else b""),
        rng.choice(BYTES),
    )
    return rng.choice(options)


def _changed_json(rng: random.Random, content: bytes) -> bytes:
    try:
        text = json.dumps(_changed_value(rng, json.loads(content)))
    except (ValueError, RecursionError):
        return _changed_bytes(rng, content, [])
    text = _changed_text(rng, text) if rng.random() < 0.2 else text
    return text.encode("utf-8", "surrogatepass")


def _changed_tensors(rng: random.Random, content: bytes) -> bytes:
    try:
        (length,) = struct.unpack("<Q", content[:8])
        return _with_changes(rng, json.loads(content[8 : 8 + length]), content[8 + length :])
    except (ValueError, TypeError, struct.error, RecursionError, OverflowError):  # it is no longer one, or too deep
        return _changed_bytes(rng, content, [])


def _changed_value(rng: random.Random, value: Any) -> Any:
    """Changes one place of a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, what = rng.choice(list(value)), rng.randrange(12)
        if what == 8:
            return {k: v for k, v in value.items() if k != key}
        if what == 9:
            other = rng.choice([*KEYS, key + key, key.upper()])
            return {(other if k == key else k): v for k, v in value.items()}
        if what == 10:
            return value | {rng.choice(KEYS): _new_value(rng)}
        if what == 11 and isinstance(value[key], dict):
            return value | {key: list(value[key].values())}
        return {**value, key: _changed_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, what = rng.randrange(len(value)), rng.randrange(10)
        if what >= 8:
            return value[:at] + value[at + 1 :] if what == 8 else value + value
        return [*value[:at], _changed_value(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, value + 8, value + 2**40, -value, value * 1000, str(value)))
    return _new_value(rng)


def _new_value(rng: random.Random) -> Any:
    return rng.choice(BIG if rng.random() < 0.05 else rng.choice((TEXTS, NUMBERS, LISTS, OBJECTS)))


def _changed_text(rng: random.Random, text: str) -> str:
    """Changes JSON text in one place, often so that it is invalid or readers differ."""
    begin, what = rng.randrange(len(text) + 1), rng.randrange(7)
    if what == 0:
        place = rng.choice([0, len(text), begin])
        return text[:place] + rng.choice(SPACES) * rng.randrange(1, 9) + text[place:]
    if what == 1:
        return text[:begin] + text[begin + rng.randrange(1, 4) :]
    if what == 2:
        return "{" + text[1:-1] + "," + text[1:-1] + "}"  # every key twice
    if what == 3:
        end = min(begin + rng.randrange(1, 60), len(text))
        return text[:end] + text[begin:end] + text[end:]
    if what == 4 and (places := [match.end() for match in re.finditer("{", text)]):
        place = rng.choice(places)
        return text[:place] + rng.choice(FIELDS) * rng.randrange(1, 3) + text[place:]
    if words := list(re.finditer(r'"[^"]*"|\d+', text)):
        word = rng.choice(words)
        return text[: word.start()] + rng.choice(WORDS) + text[word.end() :]
    return text
