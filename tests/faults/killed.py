"""Saves an adapter and merges a checkpoint, and kills the process at each step. Argument: an empty directory.

Prints as JSON, for each of the two, what was found after each kill. The script forks for each try, so that imports run
once. The steps are the calls that make, replace, remove and sync files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.checkpoints import merge

STEPS = ("mkdir", "replace", "rename", "unlink", "fsync")
top = Path(sys.argv[1])


def adapted(alpha: int) -> nn.Module:
    """Makes a model whose adapter has this ``lora_alpha`` and holds only this number."""
    model = inject(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.fill_(alpha)
    return model


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a process that is killed before its step ``number``; returns whether it has so many."""
    if (child := os.fork()) == 0:
        left = number

        def counted(step: Callable[..., object]) -> Callable[..., object]:
            def run(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments, **options)

            return run

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def tries(
    directory: Path, action: Callable[[], object], prepare: Callable[[], object], read: Callable[[], str]
) -> list:
    """What ``read`` finds after each kill, and after the last try, which was not killed."""
    found = []
    is_killed = True
    while is_killed:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        prepare()
        is_killed = killed_at(len(found) + 1, action)
        found.append(read())
        action()  # the next run is not disturbed by what is left
        assert read() == "new", found
    return found


def read_adapter(directory: Path) -> str:
    """Returns "old" or "new", or "" if there is no adapter; checks that the config and all weights are of one save."""
    try:
        layer = load_adapter(nn.Sequential(nn.Linear(4, 4)), directory)[0]
    except FileNotFoundError:
        return ""
    adapter = layer.adapters["default"]
    for parameter in adapter.parameters():
        assert torch.equal(parameter, torch.full_like(parameter, adapter.lora_alpha))
    return {5: "old", 7: "new"}[adapter.lora_alpha]


def read_merged(out: Path, base: nn.Module) -> str:
    """Returns "new" if the whole checkpoint is there, or "" if there is none."""
    if not out.exists():
        return ""
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert (out / "config.json").read_text() == "{}"
    assert not torch.equal(load_file(out / "model.safetensors")["0.weight"], base.state_dict()["0.weight"])
    return "new"


base = nn.Sequential(nn.Linear(4, 4))
models = {"old": adapted(5), "new": adapted(7)}
(top / "base").mkdir()
save_file(base.state_dict(), top / "base" / "model.safetensors")
(top / "base" / "config.json").write_text("{}")
save_adapter(models["new"], top / "adapter")
saved, out = top / "work" / "saved", top / "work" / "out"


def merge_again() -> None:
    shutil.rmtree(out, ignore_errors=True)
    merge(top / "base", [top / "adapter"], out)


results = {
    "new adapter": tries(top / "work", lambda: save_adapter(models["new"], saved), int, lambda: read_adapter(saved)),
    "adapter": tries(
        top / "work",
        lambda: save_adapter(models["new"], saved),
        lambda: save_adapter(models["old"], saved),
        lambda: read_adapter(saved),
    ),
    "merge": tries(top / "work", merge_again, int, lambda: read_merged(out, base)),
}
print(json.dumps(results))
