"""Tests the reading of safetensors files and of an adapter's two files; tests/hostile has bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, peft_adapter
from support.models import Net, adapter_of_net, snapshot

from lora_ext import load_adapter
from lora_ext.files import adapter_file
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.reading import DTYPES, open_tensors, read_tensor

pytestmark = pytest.mark.cpu_only("is about files")


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


def test_a_file_has_config_tensors_and_metadata(tmp_path):
    peft_adapter(EveryLayer(), tmp_path, **EVERY_LAYER)
    expected = {key: t.clone() for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    file = AdapterFile.open(tmp_path, caller="test")
    assert file.config["r"] == 2 and file.metadata == {"format": "pt"}
    assert file.path == tmp_path / "adapter_model.safetensors"
    assert sorted(file.tensors) == sorted(expected)
    file.path.unlink()  # a file that is replaced does not change the tensors
    save_file({key: tensor + 1 for key, tensor in expected.items()}, file.path)
    torch.testing.assert_close(file.tensors, expected, rtol=0, atol=0)


def test_opening_reads_no_tensor(tmp_path):
    """A mapped file takes no memory before its bytes are used."""
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(16 << 20, dtype=torch.uint8)}, tmp_path / "adapter_model.safetensors")
    before = resident()
    file = AdapterFile.open(tmp_path, caller="test")
    assert resident() - before < 4 << 20
    assert file.tensors["a"].sum() == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_no_reader_finds_the_weights_of_another_save(tmp_path, monkeypatch):
    """The config is read first, and is another one when the weights have been replaced."""
    adapter_of_net(tmp_path)
    read = adapter_file.read_tensors
    monkeypatch.setattr(
        adapter_file, "read_tensors", lambda path: adapter_of_net(tmp_path, lora_alpha=5) and read(path)
    )
    with pytest.raises(ValueError, match=f"test: {tmp_path} was replaced while it was read; read it again"):
        AdapterFile.open(tmp_path, caller="test")
    monkeypatch.undo()
    assert AdapterFile.open(tmp_path, caller="test").config["lora_alpha"] == 5


def test_links_of_the_user_are_followed_or_replaced(tmp_path):
    """Covers a linked directory, linked files as in the hub's cache, and ``link/..``."""
    adapter_of_net(tmp_path / "blobs")
    kept, real = snapshot(tmp_path / "blobs"), tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/real")
    for name in kept:
        (real / name).symlink_to(tmp_path / "blobs" / name)
    adapter_of_net(tmp_path / "link", lora_alpha=5)
    assert not any(path.is_symlink() for path in real.iterdir())
    assert load_adapter(Net(), real).blocks[0].up.adapters["default"].lora_alpha == 5
    assert snapshot(tmp_path / "blobs") == kept
    adapter_of_net(tmp_path / "link" / ".." / "saved")
    assert (tmp_path / "elsewhere" / "saved" / "adapter_config.json").exists()
