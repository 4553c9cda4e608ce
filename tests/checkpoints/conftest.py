from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import peft_adapter, save_checkpoint
from support.checkpoint_records import make_files
from support.models import llama
from torch import nn

from lora_ext.checkpoints import merge


@pytest.fixture
def llama_files(tmp_path: Path) -> tuple[Path, Path]:
    """A sharded checkpoint and an adapter for it."""
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    return tmp_path / "base", tmp_path / "adapter"


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A base, and a checkpoint merged from it with a record, for the tests of records."""
    return make_files(tmp_path_factory.mktemp("record"))


@pytest.fixture
def merged(files, tmp_path, monkeypatch) -> Path:
    """A copy of the merged checkpoint that a test may change."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return Path(shutil.copytree(files / "merged", tmp_path / "merged"))


@pytest.fixture(scope="session")
def small_files(tmp_path_factory) -> Path:
    """``base``, ``adapter``, ``other`` (an adapter), and ``merged`` with a record, in two files each."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bad")
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "abc"})
    save_checkpoint(model.state_dict(), folder / "base", shards=2)
    peft_adapter(model, folder / "adapter", target_modules=["a", "c"])
    peft_adapter(model, folder / "other", target_modules=["a", "c"])
    merge(folder / "base", [folder / "adapter"], folder / "merged", record=True)
    return folder
