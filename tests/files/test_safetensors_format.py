"""Compares lora_ext's reader and writer of safetensors headers with the library: both accept the same files."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file
from support.header_mutations import mutated, valid
from support.properties import given, settings, st

from lora_ext.files.safetensors_format import encode_header, header_bytes, read_header

pytestmark = pytest.mark.cpu_only("is about files")


def by_library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Dtype, shape and bytes of each tensor; None if refused."""
    try:
        return {name: (one["dtype"], list(one["shape"]), bytes(one["data"])) for name, one in deserialize(content)}
    except SafetensorError:
        return None


def by_us(path: Path, content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    path.write_bytes(content)
    try:
        tensors, _ = read_header(path)
    except ValueError as error:
        text = str(error).replace(str(path), "")
        assert text.isprintable(), text
        assert len(text) < 700
        return None
    return {
        name: (info.dtype, list(info.shape), content[info.begin : info.begin + info.nbytes])
        for name, info in tensors.items()
    }


def test_mutated_headers_are_accepted_exactly_if_the_library_accepts_them(tmp_path):
    rng, path = random.Random(1), tmp_path / "x.safetensors"
    accepted, cases = 0, 4000
    for case in range(cases):
        content = mutated(rng)
        expected = by_library(content)
        assert by_us(path, content) == expected, (case, content)
        accepted += expected is not None
    assert 0.15 < accepted / cases < 0.6  # enough of both kinds to test something


HEADERS = {
    b"": False,
    b"{}": True,
    b" {} \n": True,
    b"{}\0": False,
    b"null": False,
    b"[]": False,
    b'{"__metadata__":null}': True,
    b'{"__metadata__":{"a":1}}': False,
    b'{"__metadata__":{},"__metadata__":{}}': False,
    b'{"a":["U8",[2],[0,2]]}': True,  # serde accepts a list for a struct
    b'{"a":{"dtype":{"U8":null},"shape":[2],"data_offsets":[0,2]}}': True,
    b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":{"y":[1e9]}}}': True,
    b'{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}': False,
    b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}': False,
    b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2,3]}}': False,
    b'{"a":{"dtype":"u8","shape":[2],"data_offsets":[0,2]}}': False,
    b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"dtype":"U8"}}': False,
    b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}': True,
    b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}': True,
    b'{"a":{"dtype":"F4","shape":[5],"data_offsets":[0,2]}}': False,
    b'{"a":{"dtype":"U8","shape":[0,4611686018427387904],"data_offsets":[0,0]},'
    b'"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}': True,
    b'{"a":{"dtype":"U8","shape":[4611686018427387904,4611686018427387904,0],"data_offsets":[0,0]},'
    b'"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}': False,
    b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}': False,
    b'{"\xff":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}': False,
}


@pytest.mark.parametrize(("header", "accepted"), HEADERS.items(), ids=range(len(HEADERS)))
def test_unusual_headers(header, accepted, tmp_path):
    content = struct.pack("<Q", len(header)) + header + (b"ab" if b"2]" in header else b"")
    expected = by_library(content)
    assert (expected is not None) == accepted, "the library has changed"
    assert by_us(tmp_path / "x", content) == expected


def test_a_header_that_is_too_long_or_missing(tmp_path):
    path = tmp_path / "x"
    for content in (b"", b"\0" * 7, b"\0" * 8, struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 100) + b"{}"):
        assert by_library(content) is None
        assert by_us(path, content) is None
    with open(path, "wb") as file:  # a sparse file
        file.write(struct.pack("<Q", 100_000_001) + b"{}")
        file.truncate(100_000_009)
    with pytest.raises(ValueError, match="header too large"):
        read_header(path)


def test_pipes_directories_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a directory"), (Path("/dev/null"), "a device")):
        with pytest.raises(ValueError, match=f"is {kind}, want a regular file"):
            read_header(path)
    with pytest.raises(FileNotFoundError, match="none"):
        read_header(tmp_path / "none")


def test_messages_escape_control_characters(tmp_path):
    name = '"a\\u001b[31m\\nfake: error"'
    header = f'{{{name}:{{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}}}'.encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    with pytest.raises(ValueError, match=r"invalid offset for tensor `a\\x1b\[31m\\nfake: error`") as caught:
        read_header(tmp_path / "x")
    assert str(caught.value).isprintable()


def test_dtypes_of_a_newer_library_are_refused(tmp_path, monkeypatch):
    from lora_ext.files import safetensors_format

    save_file({"a": torch.ones(2)}, tmp_path / "x")
    monkeypatch.delitem(safetensors_format._BITS, "F32")
    with pytest.raises(ValueError, match=r"has a tensor of an unknown dtype, F32: 'a'"):
        read_header(tmp_path / "x")


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@settings(max_examples=100, deadline=None)
@given(
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=4),
    seed=st.integers(0, 2**30),
    names=st.lists(st.text(max_size=10).filter(lambda name: name != "__metadata__"), unique=True, max_size=5),
)
def test_the_library_reads_what_is_written(metadata, seed, names, tmp_path_factory):
    rng = random.Random(seed)
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    while len(tensors) < len(names):
        for info in valid(rng)[0].values():
            if "dtype" in info and len(tensors) < len(names):
                begin, end = info["data_offsets"]
                tensors[names[len(tensors)]] = info["dtype"], tuple(info["shape"]), end - begin
    header, places = encode_header(tensors, metadata)
    content = header + bytes(sum(nbytes for *_, nbytes in tensors.values()))
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
        assert set(file.keys()) == set(tensors)
    found, found_metadata = read_header(path)
    assert found == places
    assert found_metadata == metadata
    assert header_bytes(path) == header


def test_headers_that_the_library_could_not_read_are_refused():
    one = "U8", (1,), 1
    for tensors, metadata, message in (
        ({"__metadata__": one}, {}, "a tensor is called __metadata__"),
        ({"a": one}, {"step": 3}, r"metadata of a safetensors file must be strings, got \('step', 3\)"),
        ({"a": one}, {"config": {"a": "b"}}, "must be strings, got"),
        ({"a\ud800": one}, {}, "is not Unicode: .*ud800"),
        ({"a": one}, {"a": "\udfff"}, "is not Unicode: .*udfff"),
        ({"a": one}, {"a": "x" * 100_000_000}, "more than 100000000"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_header(tensors, metadata)


def test_files_of_the_library_are_read(tmp_path):
    tensors = {"b": torch.arange(6).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    found, metadata = read_header(tmp_path / "x")
    assert metadata == {"format": "pt"}
    assert {key: info.shape for key, info in found.items()} == {key: tuple(t.shape) for key, t in tensors.items()}
    assert header_bytes(tmp_path / "x") == save(tensors, {"format": "pt"})[: min(info.begin for info in found.values())]
