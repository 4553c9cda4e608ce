"""JSON and safetensors files that strangers wrote; tests/hostile has damaged ones."""

from __future__ import annotations

import json
import os
import socket
import struct

import pytest
import torch
from safetensors.torch import save_file

from lora_ext.files.reading import DTYPES, open_tensors, parse_json, read_json, read_tensor, tensor_table

pytestmark = pytest.mark.cpu_only("is about files")


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


def test_a_header_that_is_too_long(tmp_path):
    with open(tmp_path / "x", "wb") as file:  # a sparse file
        file.write(struct.pack("<Q", 100_000_001) + b"{}")
        file.truncate(100_000_009)
    with pytest.raises(ValueError, match="header too large"):
        tensor_table(tmp_path / "x")


def test_files_of_the_library_are_read(tmp_path):
    tensors = {name: torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    tensors |= {"none": torch.ones(0, 4), "scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    with open_tensors(tmp_path / "x") as (file, table):
        assert file.metadata() == {"format": "pt"}
    assert table.keys() == tensors.keys()
    for name, info in table.items():
        read = read_tensor(tmp_path / "x", info)
        assert (read.dtype, read.shape) == (tensors[name].dtype, tensors[name].shape), name
        assert torch.equal(read.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8)), name
    with open(tmp_path / "x", "r+b") as file:
        file.truncate(table["F32"].begin + 1)
    with pytest.raises(ValueError, match="x became shorter while it was read"):
        read_tensor(tmp_path / "x", table["F32"])
