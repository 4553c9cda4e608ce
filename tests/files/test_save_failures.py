"""save_adapter: a directory holds the old adapter or the new one, whatever fails, and other files stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import Net, adapter_of_net, refused

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.files import adapter_content, adapter_file

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_directory_that_cannot_be_written(tmp_path):
    model, blocker = inject(Net(), LoraConfig(target_modules=["up"])), tmp_path / "file"
    blocker.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for directory in (blocker, tmp_path / "link"):
        with refused(model, OSError, "save_adapter: cannot write there", "choose another directory", str(directory)):
            save_adapter(model, directory)
    assert blocker.read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_error_while_writing_keeps_the_old_pair(error, tmp_path, monkeypatch):
    adapter_of_net(tmp_path)
    before = contents(tmp_path)

    def failing(path, tensors, metadata):
        path.write_bytes(b"part")
        raise error

    monkeypatch.setattr(adapter_content, "write_tensors", failing)
    with pytest.raises(type(error)):
        adapter_of_net(tmp_path, r=3, lora_alpha=5)
    assert contents(tmp_path) == before


def test_no_reader_finds_the_weights_of_another_save(tmp_path, monkeypatch):
    """The config is read first, and is another one when the weights have been replaced."""
    adapter_of_net(tmp_path)
    read = adapter_file.read_tensors
    monkeypatch.setattr(
        adapter_file, "read_tensors", lambda path: adapter_of_net(tmp_path, lora_alpha=5) and read(path)
    )
    with pytest.raises(ValueError, match=f"test: {tmp_path} was replaced while it was read; read it again"):
        adapter_file.AdapterFile.open(tmp_path, caller="test")
    monkeypatch.undo()
    assert adapter_file.AdapterFile.open(tmp_path, caller="test").config["lora_alpha"] == 5


def test_links_of_the_user_are_followed_or_replaced(tmp_path):
    """Covers a linked directory, linked files as in the hub's cache, and ``link/..``."""
    adapter_of_net(tmp_path / "blobs")
    kept, real = contents(tmp_path / "blobs"), tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/real")
    for name in kept:
        (real / name).symlink_to(tmp_path / "blobs" / name)
    adapter_of_net(tmp_path / "link", lora_alpha=5)
    assert not any(path.is_symlink() for path in real.iterdir())
    assert load_adapter(Net(), real).blocks[0].up.adapters["default"].lora_alpha == 5
    assert contents(tmp_path / "blobs") == kept
    adapter_of_net(tmp_path / "link" / ".." / "saved")
    assert (tmp_path / "elsewhere" / "saved" / "adapter_config.json").exists()
