"""Files that strangers wrote: JSON, safetensors headers, and what is no regular file; the messages and the cost."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file
from support.file_mutations import mutated_tensors

from lora_ext.files.reading import (
    DTYPE_NAMES,
    DTYPES,
    open_tensors,
    parse_json,
    read_json,
    read_tensor,
    tensor_table,
)

pytestmark = pytest.mark.cpu_only("is about files")

# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"a": [1, -2.5, None, True, "\u00e9\u6f22\U0001f600"], "b": {"c": [[], {}]}},
        {"time_step_limit": [0.0, float("inf")]},  # as transformers writes it
        {"n": 10**99, "text": "\\ud800 in words", "long": "x" * 10**6},
    ],
)
def test_an_object_is_read(values, tmp_path):
    for ensure_ascii in (True, False):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(values, ensure_ascii=ensure_ascii), encoding="utf-8")
        assert read_json(path, 10**7) == values


def test_the_limits_of_a_size_and_a_depth(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, 8) == {"a": 1}
    with pytest.raises(ValueError, match=r"x\.json is larger than 7 bytes"):
        read_json(path, 7)
    assert parse_json('{"a": ' + "[" * 63 + "]" * 63 + "}", "the largest depth")


@pytest.mark.parametrize("read", [read_json, tensor_table])
def test_only_regular_files_are_opened_and_none_is_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        kinds = {"pipe": "a pipe", "link": "a pipe", "socket": "a socket", ".": "a directory", "/dev/zero": "a device"}
        for name, kind in kinds.items():
            with pytest.raises(ValueError, match=f"is {kind}, want a regular file"):
                read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none"):
        read(tmp_path / "none")


# --- safetensors ------------------------------------------------------------------------------------------------------

Found = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape and bytes


def by_library(content: bytes) -> Found | None:
    """The tensors in a file; None if it is refused."""
    try:
        return {name: (one["dtype"], list(one["shape"]), bytes(one["data"])) for name, one in deserialize(content)}
    except SafetensorError:
        return None


def by_us(path: Path, content: bytes) -> Found | None:
    path.write_bytes(content)
    try:
        table = tensor_table(path)
    except ValueError as error:
        text = str(error).replace(str(path), "")
        assert text.isprintable() and len(text) < 700, text
        return None
    return {
        name: (DTYPE_NAMES[info.dtype], list(info.shape), content[info.begin : info.begin + info.nbytes])
        for name, info in table.items()
    }


def unusable(tensors: Found) -> bool:
    """Returns whether PyTorch could not hold a tensor, or a message could not name it."""
    return not all(map(str.isprintable, tensors)) or any(
        dtype not in DTYPES or torch.Size([max(size, 1) for size in shape]).numel() > 2**59 or len(shape) > 64
        for dtype, shape, _ in tensors.values()
    )


def test_mutated_headers_are_accepted_exactly_if_the_library_accepts_them(tmp_path):
    rng, path = random.Random(1), tmp_path / "x.safetensors"
    accepted, cases = 0, 2000
    for case in range(cases):
        content = mutated_tensors(rng)
        expected = by_library(content)
        found = by_us(path, content)
        assert found == expected or (found is None and unusable(expected)), (case, content)
        accepted += found is not None
    assert 0.15 < accepted / cases < 0.6  # enough of both kinds to test something


def test_a_header_that_is_too_long_or_missing(tmp_path):
    path = tmp_path / "x"
    for content in (b"", b"\0" * 7, b"\0" * 8, struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 100) + b"{}"):
        assert by_library(content) is None and by_us(path, content) is None
    with open(path, "wb") as file:  # a sparse file
        file.write(struct.pack("<Q", 100_000_001) + b"{}")
        file.truncate(100_000_009)
    with pytest.raises(ValueError, match="header too large"):
        tensor_table(path)


def test_files_of_the_library_are_read(tmp_path):
    tensors = {"b": torch.arange(6).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    with open_tensors(tmp_path / "x") as (file, table):
        assert file.metadata() == {"format": "pt"}
    assert table.keys() == tensors.keys()
    assert all(torch.equal(read_tensor(tmp_path / "x", info), tensors[name]) for name, info in table.items())
    with open(tmp_path / "x", "r+b") as file:
        file.truncate(table["a"].begin + 1)
    with pytest.raises(ValueError, match="x became shorter while it was read"):
        read_tensor(tmp_path / "x", table["a"])
