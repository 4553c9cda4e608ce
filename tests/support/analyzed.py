"""Makes a tiny base and its adapters on disk, for the tests of ``lora-ext analyze`` and ``report``."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from support.checkpoint_files import edit_config, edit_tensors, peft_adapter, save_checkpoint, tensors_of
from support.models import bert, llama, shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, save_adapter


def own_adapter(model: nn.Module, directory: Path, seed: int, **settings: Any) -> Path:
    """Injects a copy of ``model``, changes its factors and saves the adapter with lora_ext."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings})
    save_adapter(shaken(inject(copy.deepcopy(model), config)), directory)
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
    shutil.copytree(adapter, copied)
    edit_config(copied, base_model_name_or_path=name)
    return copied


def save_misfits(folder: Path) -> Path:
    """Saves :func:`save_files`, and bases and adapters that do not fit them or hold numbers that are not finite."""
    save_files(folder)
    save_checkpoint(dict(bert().state_dict()), folder / "bert")
    own_adapter(bert(), folder / "query", 0, target_modules=["query"])
    peft_adapter(llama(), folder / "dora", target_modules=["q_proj"], use_dora=True)
    attention = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(24, 16)})})
    wide = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([attention])})})
    own_adapter(wide, folder / "wide", 0, target_modules=["q_proj"])
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    broken = name_base(folder / "four", folder / "broken", "base")
    edit_tensors(broken, lambda values: values | {key: values[key] * torch.nan})
    weights = {key: value.clone() for key, value in llama().state_dict().items()}
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.inf
    save_checkpoint(weights, folder / "infinite")
    return folder


# --- the figures, from whole matrices ---------------------------------------------------------------------------------


def factors(adapter: Path, layer: str) -> tuple[Tensor, Tensor]:
    found = tensors_of(adapter)
    return tuple(found[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
