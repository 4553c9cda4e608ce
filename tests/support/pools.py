"""Adapters on disk for a pool, and what rows that name them get."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_ext import AdapterPool, LoraConfig, inject, load_adapter, save_adapter

TARGETS = ["up", "head"]


def write_adapters(model: nn.Module, root: Path, names: list[str], targets: list[str] = TARGETS, **options) -> None:
    """Saves random adapters of ranks 1 to 4; every third one lacks the last target."""
    for i, name in enumerate(names):
        mine = targets[:-1] if i % 3 == 2 else targets
        config = {"r": 1 + i % 4, "lora_alpha": 3 + i, "target_modules": mine, "init_lora_weights": False}
        bare = inject(copy.deepcopy(model), LoraConfig(**config | options))
        save_adapter(bare, root / name)


def expected_rows(model: nn.Module, root: Path, names: list[str], x: Tensor) -> Tensor:
    """The rows, each from a model with its adapter alone."""
    rows = {}
    for name in dict.fromkeys(names):
        alone = copy.deepcopy(model)
        rows[name] = (alone if name == "__base__" else load_adapter(alone, root / name)).eval()(x)
    return torch.stack([rows[name][i] for i, name in enumerate(names)])


NAMES = [f"n{i}" for i in range(8)]


def slot_bytes(r: int = 4) -> int:
    return 2 * (r * (6 + 10) * 4 + 16) + r * (6 + 3) * 4 + 16


def pool_of(model: nn.Module, root: Path | None, slots: int = 3, **options) -> AdapterPool:
    return AdapterPool(model, root, **{"target_modules": TARGETS, "r": 4, "max_bytes": slots * slot_bytes()} | options)
