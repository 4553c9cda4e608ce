"""Makes a tiny base and its adapters on disk, for the tests of ``lora-ext analyze`` and ``report``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from support.models import llama
from torch import nn

from lora_ext import LoraConfig, inject, save_adapter


def own_adapter(model: nn.Module, directory: Path, seed: int, **settings: Any) -> Path:
    """Injects a copy of ``model``, changes its factors and saves the adapter with lora_ext."""
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
    """Saves ``base`` in ``folder``, and ``four`` and ``six``, its adapters with different ranks and seeds."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "base", max_shard_size="8KB")
    own_adapter(model, folder / "four", 1)
    own_adapter(model, folder / "six", 2, r=6, target_modules=["q_proj", "v_proj", "up_proj"])
    return folder


def name_base(adapter: Path, copied: Path, name: str) -> Path:
    """Copies the adapter and sets the base's name in its config."""
    copied.mkdir(parents=True)
    for file in adapter.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return copied
