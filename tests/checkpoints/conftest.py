from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import peft_adapter, save_checkpoint
from torch import nn


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "abc"})
    save_checkpoint(model.state_dict(), folder / "base", shards=2)
    adapted = peft_adapter(model, folder / "adapter", target_modules=["a", "c"])
    save_checkpoint(adapted.merge_and_unload().state_dict(), folder / "tuned", shards=2)
    return folder


@pytest.fixture
def files(made_once: Path, tmp_path: Path) -> Path:
    """``base`` and ``tuned``, checkpoints in two files each, and ``adapter``, one of their layers ``a`` and ``c``."""
    return Path(shutil.copytree(made_once, tmp_path, dirs_exist_ok=True))
