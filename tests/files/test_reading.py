"""Untrusted JSON, and headers of safetensors files: what is refused, the messages, and the cost."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import socket
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file
from support.header_mutations import mutated

from lora_ext.files.reading import BITS, open_tensors, parse_json, read_json, read_metadata, read_tensor, tensor_table

pytestmark = pytest.mark.cpu_only("is about files")


@pytest.mark.parametrize("read", [read_json, tensor_table])
def test_only_regular_files_are_opened_and_none_is_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to(tmp_path / "pipe")
        kinds = {"pipe": "a pipe", "link": "a pipe", "socket": "a socket", ".": "a directory", "/dev/zero": "a device"}
        for name, kind in kinds.items():
            with pytest.raises(ValueError, match=f" is {kind}, want a regular file"):
                read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none"):
        read(tmp_path / "none")


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"a": [1, -2.5, None, True, "\u00e9\u6f22\U0001f600"], "b": {"c": [[], {}]}},
        {"time_step_limit": [0.0, float("inf")]},  # as transformers writes it
        {"n": 10**99, "text": "\\ud800 in words", "long": "x" * 10**6},
        json.loads('{"a": ' + "[" * 63 + "]" * 63 + "}"),
    ],
)
def test_an_object_is_read(values, tmp_path):
    for ensure_ascii in (True, False):
        text = json.dumps(values, ensure_ascii=ensure_ascii)
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "x.json")
        assert read_json(tmp_path / "link", limit=len(text.encode())) == values
        with pytest.raises(ValueError, match=rf"test: .*x\.json is larger than {len(text.encode()) - 1} bytes"):
            read_json(tmp_path / "x.json", "test", len(text.encode()) - 1)


WRONG = {
    "": "is not JSON",
    "{": "is not JSON",
    "[1]": "holds a list, want an object",
    "1": "holds a int, want an object",
    "null": "holds a NoneType, want an object",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "is not JSON: the key 'c' occurs twice",
    '{"a": -' + "9" * 5000 + "}": "is not JSON: Exceeds the limit",
    '{"a": "\\ud800"}': r"has a string that is not Unicode: '{\"a\": \"\ud800\"}'".replace('\\"', '"'),
    '{"a": [["\\udfff"]]}': "has a string that is not Unicode: ",
    '{"\\ud800": 1}': "has a string that is not Unicode: ",
    '{"a": ' + "[" * 64 + "]" * 64 + "}": "more than 64 levels",
    '{"a": ' * 65 + "1" + "}" * 65: "more than 64 levels",
    '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}": "more than 64 levels",
    '{"a": "\n"}': "is not JSON",
    "\ufeff{}": "is not JSON",
    b"\xff{}": "is not JSON",
    b'{"a": "\xed\xa0\x80"}': "is not JSON",
    b"\0" * 10: "is not JSON",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_bad_json_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for source, read in (
        (f"test: {path}", lambda: read_json(path, "test")),
        ("a note", lambda: parse_json(text, "a note")),
    ):
        with pytest.raises(ValueError) as caught:
            read()
        said = str(caught.value)
        assert said.startswith(f"{source} ") and message in said
        assert "\n" not in said and len(said) < len(source) + 300


def _costly(size: int) -> dict[str, str]:
    """Objects of about ``size`` bytes that are expensive to parse."""
    return {
        "lists": '{"a": [' + ",".join(["[]"] * (size // 3)) + "]}",
        "keys": "{" + ",".join(f'"{i:06}": 0' for i in range(size // 12)) + "}",
        "digits": '{"a": [' + ",".join(["9" * 99] * (size // 100)) + "]}",
        "one number": '{"a": ' + "9" * size + "}",
        "one key twice": '{"' + "x" * (size // 2) + '": 0, "' + "x" * (size // 2) + '": 0}',
        "escapes": '{"a": "' + "\\u00e9" * (size // 6) + '"}',
        "depth": '{"a": ' + "[" * (size // 2) + "]" * (size // 2) + "}",
    }


@pytest.mark.parametrize("name", _costly(100))
def test_a_file_of_a_megabyte_is_cheap(name):
    """Memory is bounded, and time grows with the size, not with its square."""
    seconds = []
    for size in (125_000, 1_000_000):
        text = _costly(size)[name]
        tracemalloc.start()
        begin = time.process_time()
        with contextlib.suppress(ValueError):
            parse_json(text, "x")
        seconds.append(time.process_time() - begin)
        assert tracemalloc.get_traced_memory()[1] < 100e6
        tracemalloc.stop()
    assert seconds[1] < 40 * (seconds[0] + 0.01)  # 8 times the size


# --- safetensors ------------------------------------------------------------------------------------------------------


def by_library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Dtype, shape and bytes of each tensor; None if refused."""
    try:
        return {name: (one["dtype"], list(one["shape"]), bytes(one["data"])) for name, one in deserialize(content)}
    except SafetensorError:
        return None


def by_us(path: Path, content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    path.write_bytes(content)
    try:
        table = tensor_table(path)
    except ValueError as error:
        text = str(error).replace(str(path), "")
        assert text.isprintable() and len(text) < 700, text
        return None
    with open_tensors(path) as handle:
        assert set(handle.keys()) == table.keys()
    return {
        name: (info.dtype, list(info.shape), content[info.begin : info.begin + info.nbytes])
        for name, info in table.items()
    }


def test_mutated_headers_are_accepted_exactly_if_the_library_accepts_them(tmp_path):
    """Except names that cannot be printed, and shapes that PyTorch cannot hold."""
    rng, path = random.Random(1), tmp_path / "x.safetensors"
    accepted, cases = 0, 4000
    for case in range(cases):
        content = mutated(rng)
        expected = by_library(content)
        if expected is not None and not all(
            name.isprintable() and math.prod(max(size, 1) for size in shape) <= 2**59
            for name, (_, shape, _) in expected.items()
        ):
            expected = None
        assert by_us(path, content) == expected, (case, content)
        accepted += expected is not None
    assert 0.15 < accepted / cases < 0.6  # enough of both kinds to test something


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


BAD = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\0" * 7, "not a safetensors file"),
    "a header of 2^64": (struct.pack("<Q", 2**64 - 1) + b"{}", "header too large"),
    "a longer header": (struct.pack("<Q", 100) + b"{}", "not a safetensors file"),
    "data left out": (
        file_of(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"x"),
        "not a safetensors file",
    ),
    "more data": (file_of(b"{}", b"x"), "not a safetensors file"),
    "a gap": (
        file_of(b'{"a\\u001b[31m\\n":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', b"abc"),
        r"`a\x1b[31m\n`",
    ),
    "a shape that lies": (
        file_of(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}}', b"ab"),
        "not a safetensors",
    ),
    "a huge shape of nothing": (
        file_of(b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'),
        "a has a shape that PyTorch cannot hold: [0, 4611686018427387904]",
    ),
    "many dimensions": (
        file_of(b'{"a":{"dtype":"U8","shape":[' + b"1," * 999 + b'1],"data_offsets":[0,1]}}', b"x"),
        "a has a shape that PyTorch cannot hold: [1, 1",
    ),
    "a long name": (
        file_of(b'{"' + b"x" * 501 + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "has a name of 501 characters, want at most 500",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused_in_one_line(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / "x").write_bytes(content)
    for read in (tensor_table, lambda path: open_tensors(path).__enter__()):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / "x")
        assert message in str(caught.value) and str(caught.value).isprintable()


def test_dtypes_of_a_newer_library_are_refused(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "x")
    monkeypatch.delitem(BITS, "F32")
    with pytest.raises(ValueError, match=r"has a tensor of an unknown dtype, F32: 'a'"):
        tensor_table(tmp_path / "x")


def test_tensors_of_the_librarys_files_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.arange(6).reshape(2, 3),
        "a": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.ones(0, 4),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    table = tensor_table(path)
    assert read_metadata(path) == {"format": "pt"} and table.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (table[name].torch_dtype, table[name].shape) == (tensor.dtype, tuple(tensor.shape))
        read = read_tensor(path, table[name])
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="x.safetensors became shorter while it was read"):
        read_tensor(path, max(table.values(), key=lambda info: info.begin))
