"""A tiny base and adapters of it on disk, and their analysis: shared by the tests of ``lora-ext analyze``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import llama
from torch import nn

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.tasks.analyze import run as analyze
from lora_ext.tasks.analyze.run import AnalysisSettings


def own_adapter(model: nn.Module, directory: Path, seed: int, **settings: Any) -> Path:
    """A copy of ``model`` injected, changed and saved by lora_ext."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(model, directory)
    return directory


def save_files(folder: Path) -> Path:
    """``base`` in ``folder``, and ``four`` and ``six``, adapters of it with other ranks and seeds."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "base", max_shard_size="8KB")
    own_adapter(model, folder / "four", 1)
    own_adapter(model, folder / "six", 2, r=6, target_modules=["q_proj", "v_proj", "up_proj"])
    return folder


def name_base(adapter: Path, copied: Path, name: str) -> Path:
    """A copy of the adapter whose config names its base so."""
    copied.mkdir(parents=True)
    for file in adapter.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return copied


def run(out: Path, *adapters: Path, base: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Without pictures, which take longer than all the rest."""
    chosen = AnalysisSettings(tuple(map(str, adapters)), base=None if base is None else str(base), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze.results, "draw", lambda analysis, out: [])
        return analyze.analyze(chosen, out, say=lambda _: None)
