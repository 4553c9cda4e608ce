"""Makes invalid and unusual headers of safetensors files from a seed."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

DTYPES = {"F64": 64, "F32": 32, "BF16": 16, "U8": 8, "BOOL": 8, "I64": 64, "F8_E4M3": 8, "F8_E8M0": 8}
DTYPES |= {"F4": 4, "F6_E2M3": 6}
NUMBERS = ["-0", "0", "-1", "1.0", "1e0", "1E2", "2e", "01", "0x1", "+1", "1_0", "4", "1e999"]
NUMBERS += ["NaN", "Infinity", "-Infinity", str(2**62), str(2**63), str(2**64 - 1), str(2**64)]
NUMBERS += ["9" * digits for digits in (18, 19, 20, 40, 5000)]
VALUES = ["null", "true", "[]", "{}", '""', '"F32"', '{"F32":null}', "[1]", "[[1]]", '[{"a":1}]', '"1"', "[0,8]"]
STRINGS = ['"\\ud800"', '"\\ud83d\\ude00"', '"\\udc00\\ud800"', '"\\u0000"', '"\n"', '"\\x"', "'a'", '"\\/"']
SPACES = [" ", "\n", "\t", "\r", "\u00a0", "\ufeff", "\f", "\0", "/**/", ","]


def valid(rng: random.Random) -> tuple[dict[str, Any], int]:
    """Makes a header; returns it and the bytes of its tensors. Some tensors are empty; some dtypes are sub-byte."""
    tensors: dict[str, Any] = {}
    end = 0
    for i in range(rng.randrange(5)):
        name = rng.choice(["a", "layer.weight", "\u00e9\u6f22", "", " ", "x" * 50]) + str(i)
        dtype, bits = rng.choice(list(DTYPES.items()))
        shape = [rng.choice([0, 1, 2, 4, 8]) for _ in range(rng.randrange(4))]
        size = bits
        for dimension in shape:
            size *= dimension
        if size % 8:
            shape, size = [*shape, 4], size * 4
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size // 8]}
        end += size // 8
    if rng.random() < 0.5:
        tensors["__metadata__"] = {"format": "pt", "note": '\u00e9 \\ " \n'} if rng.random() < 0.7 else {}
    items = list(tensors.items())
    rng.shuffle(items)
    return dict(items), end


def mutated(rng: random.Random) -> bytes:
    """Makes a whole file; its header is a valid one with zero to three changes."""
    header, size = valid(rng)
    return changed(rng, header, bytes(rng.randrange(256) for _ in range(size)))


def changed(rng: random.Random, header: dict[str, Any], data: bytes) -> bytes:
    """Makes a whole file of a header, with zero to three changes, and the data of its tensors."""
    for _ in range(rng.randrange(3)):
        _STRUCTURE[rng.randrange(len(_STRUCTURE))](rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5, separators=rng.choice([(",", ":"), (", ", ": ")]))
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        text = changed_text(rng, text)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        raw = _flipped(rng, raw)
    length = len(raw)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, 7, length - 1, length + 1, length + len(data), 2**31, 100_000_001, 2**63, 2**64 - 1])
    if rng.random() < 0.1:
        data = rng.choice([data[:-1], data + b"\0", data + data, b""])
    content = struct.pack("<Q", max(length, 0)) + raw + data
    return content[: rng.randrange(len(content))] if rng.random() < 0.03 else content


def changed_text(rng: random.Random, text: str) -> str:
    """Changes JSON text in one place, often so that it is invalid or readers differ."""
    return _TEXT[rng.randrange(len(_TEXT))](rng, text)


def _tensor(rng: random.Random, header: dict[str, Any]) -> Any:
    infos = [value for name, value in header.items() if name != "__metadata__" and isinstance(value, dict)]
    return rng.choice(infos) if infos else {}


def _value(rng: random.Random) -> Any:
    simple = [None, True, -1, 0, 1, 8, 1.0, 1e300, 2**62, 2**64, "F32", "f32", "F12", "I4", "F8_E4M3FNUZ", "", "\ud800"]
    lists = [[], [0], [0, 8], [8, 0], [0, 8, 16], [[2]], [2.0], ["2"], [-1], [2**63, 0], [0, 2**63], [2**62, 2**62, 0]]
    others = [[0, 2**62, 2**62], {}, {"F32": None}, {"F32": 1}, {"F32": None, "U8": None}]
    return rng.choice([*simple, *lists, *others, nested(rng.choice([5, 100, 127, 128, 200]))])


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _set_field(rng: random.Random, header: dict[str, Any]) -> None:
    _tensor(rng, header)[rng.choice(["dtype", "shape", "data_offsets", "data_offsets", "extra", "Dtype"])] = _value(rng)


def _drop_field(rng: random.Random, header: dict[str, Any]) -> None:
    _tensor(rng, header).pop(rng.choice(["dtype", "shape", "data_offsets"]), None)


def _move(rng: random.Random, header: dict[str, Any]) -> None:
    info = _tensor(rng, header)
    if isinstance(offsets := info.get("data_offsets"), list) and len(offsets) == 2:
        i, by = rng.randrange(2), rng.choice([-8, -1, 1, 4, 2**40, 2**63])
        if type(offsets[i]) is int:
            offsets[i] += by


def _as_list(rng: random.Random, header: dict[str, Any]) -> None:
    if header:
        name = rng.choice(list(header))
        if isinstance(header[name], dict):
            header[name] = list(header[name].values())


def _add(rng: random.Random, header: dict[str, Any]) -> None:
    header[rng.choice(["z", "__metadata__", "\ud800"])] = _value(rng)


def _metadata(rng: random.Random, header: dict[str, Any]) -> None:
    value = rng.choice([None, 1, [], ["a"], {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}, {"": ""}, "a", {"a": "b"}])
    header["__metadata__"] = value


def _remove(rng: random.Random, header: dict[str, Any]) -> None:
    if header:
        header.pop(rng.choice(list(header)))


_STRUCTURE: list[Callable[[random.Random, dict[str, Any]], None]]
_STRUCTURE = [_set_field, _set_field, _drop_field, _move, _move, _as_list, _add, _metadata, _remove]


def _spaces(rng: random.Random, text: str) -> str:
    place = rng.choice([0, len(text), rng.randrange(len(text) + 1)])
    return text[:place] + rng.choice(SPACES) * rng.randrange(1, 9) + text[place:]


def _number(rng: random.Random, text: str) -> str:
    places = [i for i, c in enumerate(text) if c.isdigit()]
    if not places:
        return text
    place = rng.choice(places)
    return text[:place] + rng.choice(NUMBERS) + text[place + 1 :]


def _string(rng: random.Random, text: str) -> str:
    places = [i for i, c in enumerate(text) if c == '"']
    if len(places) < 2:
        return text
    i = rng.randrange(len(places) - 1)
    return text[: places[i]] + rng.choice(STRINGS + VALUES) + text[places[i + 1] + 1 :]


def _repeat(rng: random.Random, text: str) -> str:
    """Repeats the object's content or a piece of it, which duplicates keys."""
    if rng.random() < 0.5 and len(text) > 2:
        return "{" + text[1:-1] + "," + text[1:-1] + "}"
    begin = rng.randrange(len(text) + 1)
    end = min(begin + rng.randrange(1, 60), len(text))
    return text[:end] + text[begin:end] + text[end:]


def _field_twice(rng: random.Random, text: str) -> str:
    field = rng.choice(['"dtype":"F32",', '"shape":[2],', '"data_offsets":[0,8],', '"extra":1,', '"__metadata__":{},'])
    places = [i for i, c in enumerate(text) if c == "{"]
    if not places:
        return text
    place = rng.choice(places) + 1
    return text[:place] + field * rng.randrange(1, 3) + text[place:]


def _cut(rng: random.Random, text: str) -> str:
    begin = rng.randrange(len(text) + 1)
    return text[:begin] + text[begin + rng.randrange(1, 4) :]


_TEXT: list[Callable[[random.Random, str], str]]
_TEXT = [_spaces, _spaces, _number, _number, _string, _repeat, _field_twice, _cut]


def _flipped(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 3)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
