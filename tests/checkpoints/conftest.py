from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoint_files import peft_adapter
from support.models import llama


@pytest.fixture
def llama_files(tmp_path: Path) -> tuple[Path, Path]:
    """A sharded checkpoint and an adapter for it."""
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    return tmp_path / "base", tmp_path / "adapter"
