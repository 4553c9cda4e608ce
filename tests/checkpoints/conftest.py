from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoint_files import peft_adapter, save_checkpoint
from support.models import llama
from torch import nn


@pytest.fixture
def llama_files(tmp_path: Path) -> tuple[Path, Path]:
    """A sharded checkpoint and an adapter for it."""
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    return tmp_path / "base", tmp_path / "adapter"


@pytest.fixture(scope="session")
def small_files(tmp_path_factory) -> Path:
    """``base`` and ``tuned``, checkpoints in two files each, and ``adapter``, one of their layers ``a`` and ``c``."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "abc"})
    save_checkpoint(model.state_dict(), folder / "base", shards=2)
    adapted = peft_adapter(model, folder / "adapter", target_modules=["a", "c"])
    save_checkpoint(adapted.merge_and_unload().state_dict(), folder / "tuned", shards=2)
    return folder
