"""save_adapter: a directory holds the old adapter or the new one, whatever fails, and other files stay."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.models import Net, adapter_of_net, refused
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def test_saving_replaces_the_adapter_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for r in (2, 3):
        adapter_of_net(tmp_path, r=r)
        assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert load_adapter(Net(), tmp_path).blocks[0].up.adapters["default"].r == r
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_directory_that_cannot_be_written(tmp_path):
    model = inject(Net(), LoraConfig(target_modules=["up"]))
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for directory, what in ((blocker, blocker), (blocker / "below", blocker), (tmp_path / "link", tmp_path / "link")):
        words = f"save_adapter: {what} is no directory; choose another path"
        with refused(model, OSError, words, str(directory)):
            save_adapter(model, directory)
    assert blocker.read_text() == "mine"


@pytest.mark.parametrize("failing_move", [1, 2, 3])
def test_an_error_while_replacing_keeps_the_old_pair(failing_move, tmp_path, monkeypatch):
    adapter_of_net(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, moves = os.replace, []

    def failing_replace(source, target):
        moves.append(source)
        if len(moves) == failing_move:
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(OSError, match="disk gone"):
        adapter_of_net(tmp_path, r=3, lora_alpha=5)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("move", [1, 2, 3, 4, 5])
def test_an_interrupt_while_replacing_waits_for_the_new_pair(move, tmp_path, monkeypatch):
    adapter_of_net(tmp_path)
    replace, moves = os.replace, []

    def interrupted_replace(source, target):
        replace(source, target)
        moves.append(source)
        if len(moves) == move:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupted_replace)
    with pytest.raises(KeyboardInterrupt):
        adapter_of_net(tmp_path, r=3, lora_alpha=5)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_adapter(Net(), tmp_path).blocks[0].up.adapters["default"].lora_alpha == 5


def test_a_staging_directory_that_cannot_be_removed_gives_a_warning(tmp_path, monkeypatch):
    adapter_of_net(tmp_path)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"all is saved, but .*\.lora_ext-saving"):
        patch.setattr(shutil, "rmtree", mock.Mock(side_effect=OSError(16, "Device or resource busy")))
        adapter_of_net(tmp_path, lora_alpha=5)
    assert load_adapter(Net(), tmp_path).blocks[0].up.adapters["default"].lora_alpha == 5
    adapter_of_net(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_directories_and_files_in_the_way_are_reported(tmp_path):
    (tmp_path / "adapter_config.json").mkdir()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write there \(Is a directory: .*adapter_config\.json\)"):
        adapter_of_net(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "mine"]
    (tmp_path / "adapter_config.json").rmdir()
    (tmp_path / ".lora_ext-saving").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write there \(File exists: .*\.lora_ext-saving\)"):
        adapter_of_net(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lora_ext-saving", "mine"]


def test_an_error_removes_created_directories(tmp_path):
    model = inject(Net(), LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    model.head.adapters["default"].bias.data = model.head.adapters["default"].bias.data.to(torch.complex128)
    with refused(model, ValueError, "torch.complex128, which the safetensors format lacks"):
        save_adapter(model, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_links_of_the_user_are_followed_or_replaced(tmp_path, monkeypatch):
    """Covers a linked directory, a relative path, and linked files as in the hub's cache."""
    adapter_of_net(tmp_path / "blobs")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in kept:
        (tmp_path / "real" / name).symlink_to(tmp_path / "blobs" / name)
    monkeypatch.chdir(tmp_path)
    adapter_of_net(Path("link"), lora_alpha=5)
    assert not any(path.is_symlink() for path in (tmp_path / "real").iterdir())
    assert load_adapter(Net(), "real").blocks[0].up.adapters["default"].lora_alpha == 5
    assert {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == kept


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        save_adapter(inject(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])), tmp_path)
    finally:
        os.umask(before)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644, name


def test_a_path_that_leaves_a_symbolic_link(tmp_path):
    """``link/..`` is the parent of what the link leads to, when saving as when loading."""
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "run")
    model = inject(Net(), LoraConfig(r=2, target_modules=["up"]))
    save_adapter(model, tmp_path / "link" / ".." / "saved")
    assert (tmp_path / "elsewhere" / "saved" / "adapter_config.json").exists()
    load_adapter(Net(), tmp_path / "link" / ".." / "saved")
