"""Makes valid files, which the mutator then changes: adapters and checkpoints."""

from __future__ import annotations

import copy
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

BASES: dict[str, Callable[[Path], None]] = {}


def base(function: Callable[[Path], None]) -> Callable[[Path], None]:
    BASES[function.__name__] = function
    return function


def make_base(name: str, directory: Path) -> Path:
    """Copies the files to ``directory``, which must not exist yet."""
    return Path(shutil.copytree(original(name), directory, symlinks=True))


@functools.cache
def original(name: str) -> Path:
    """Makes the files once for all processes that share a folder; returns their directory."""
    made = folder() / name
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            fresh = made.with_suffix(".new")
            fresh.mkdir()
            torch.manual_seed(0)
            BASES[name](fresh)
            fresh.rename(made)
    return made


@functools.cache
def folder() -> Path:
    """Directory for all files: a temporary one that the parent process removes."""
    return Path(os.environ.get("FUZZ_FOLDER") or tempfile.mkdtemp(prefix="fuzz-"))


def net() -> nn.Module:
    from support.models import Net

    torch.manual_seed(0)
    return Net().eval()


def _filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


@base
def adapter(directory: Path) -> None:
    """Makes an adapter of :func:`net` with several kinds of entries."""
    from lora_ext import LoraConfig, inject, save_adapter

    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["up", "down"],
        rank_pattern={"blocks.1.up": 3},
        alpha_pattern={"down": 1.5},
        modules_to_save=["head"],
        lora_dropout=0.1,
    )
    save_adapter(_filled(inject(net(), config)), directory / "adapter")


@base
def checkpoint(directory: Path) -> None:
    """Makes a checkpoint in two files, another that differs from it, and an adapter."""
    from support.checkpoint_files import save_checkpoint

    from lora_ext import LoraConfig, inject, save_adapter

    model = net()
    save_checkpoint(model.state_dict(), directory / "base", shards=2)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.blocks[0].up.weight.add_(torch.outer(torch.randn(10), torch.randn(6)))
    save_checkpoint(tuned.state_dict(), directory / "tuned", shards=1)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"])
    save_adapter(_filled(inject(model, config)), directory / "adapter")
