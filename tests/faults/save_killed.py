"""Saves an adapter and kills the process at each call that changes files, or fills or locks the disk.

Arguments: a directory, the saved kind ("adapter" or "method"), and cases such as "old,locks": what exists before
("nothing", "old" or "another shape") and what the file system lacks ("nothing", "symbolic links", "hard links" or
"locks").

The test checks what PEFT reads, because importing PEFT here would slow the forks down. The directory ``left`` gets each
kill's leftovers.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from faults.tries import Fault, attempt, each_call, restore, snapshot
from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.methods import apply_method, load_method, new_method, save_method

top, what = Path(sys.argv[1]), sys.argv[2]
directory = top / "new" / "saved"
OWN = {"adapter": ("adapter_config.json", "adapter_model.safetensors")}
OWN["method"] = (*OWN["adapter"], "method.json")
LACKING = {"symbolic links": (os, "symlink"), "hard links": (os, "link"), "locks": (fcntl, "flock")}
os.fsync = lambda fd: None  # slow, and useful only if the machine stops


def bare() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def model_of(seed: int, **settings) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": seed, "target_modules": ["0"], "init_lora_weights": False} | settings
    if what == "adapter":
        return inject(bare(), LoraConfig(**settings))
    return apply_method(bare(), new_method("lora", **settings))


def save(model: nn.Module) -> None:
    save_adapter(model, directory) if what == "adapter" else save_method(model, directory)


def state_of(model: nn.Module) -> dict[str, list]:
    factors = {name: p.tolist() for name, p in model.named_parameters() if "lora_" in name}
    return factors | {"alpha": [layer.adapters["default"].lora_alpha for layer in model if hasattr(layer, "adapters")]}


class Case:
    def __init__(self, before: str, lacks: str) -> None:
        self.lacks, self.leftovers = lacks, []
        shape = {"r": 3, "target_modules": ["0", "1"], "use_rslora": True} if before == "another shape" else {}
        models = {"old": model_of(5, **shape), "new": model_of(7)}
        self.model = models["new"]
        self.states = {name: state_of(model) for name, model in models.items()}
        contents = {}
        for name, model in models.items():
            restore(top / "new", None)
            save(model)
            if before != "nothing":
                (directory / "tokenizer").mkdir()
                (directory / "tokenizer" / "vocab.txt").write_text("the user's own")
            contents[name] = snapshot(top / "new")
        self.new = contents["new"]
        self.old, self.first = (None, "") if before == "nothing" else (contents["old"], "old")

    def read(self) -> str:
        """Returns "old" or "new", or "" if there is no adapter."""
        try:
            loaded = (load_adapter if what == "adapter" else load_method)(bare(), directory)
        except FileNotFoundError as error:
            assert "is missing" in str(error) or "there is no" in str(error), error
            assert not (directory / OWN[what][0 if what == "adapter" else -1]).exists()
            return ""
        found = [name for name, state in self.states.items() if state == state_of(loaded)]
        assert len(found) == 1, state_of(loaded)
        return found[0]

    def check_only(self, content: dict | None) -> None:
        """Checks that the directory holds exactly this content, without links."""
        assert snapshot(top / "new") == content, sorted(snapshot(top / "new") or ())
        assert not [path for path in directory.rglob("*") if path.is_symlink()]

    def tries(self, kind: str) -> dict:
        seen = set()
        for at, outcome in each_call(self.save, top / "new", kind, lambda: restore(top / "new", self.old)):
            state, last = self.read(), (at, outcome.ended, outcome.last)
            seen.add(state)
            # Without links, a disk that refuses to move files back leaves a gap.
            gap = {""} if self.lacks == "symbolic links" and kind != "disk full" else set()
            if outcome.ended == "returned":
                assert state == "new", last
                if kind != "read-only":  # a read-only disk can keep files that should be removed
                    self.check_only(self.new)
            elif outcome.ended == "raised":
                assert state in {self.first, *gap}, last
                assert "OSError" in outcome.bases, outcome
                for words in (f"save_{what}: cannot write there", str(directory), "choose another directory"):
                    assert words in outcome.message, outcome
                if kind == "disk full":
                    self.check_only(self.old)
            else:
                assert state in {self.first, "new", *gap}, last
                if directory.exists():
                    self.leftovers.append([str(top / "left" / f"{before}, {lacks}, {at}"), state])
                    shutil.copytree(directory, self.leftovers[-1][0], symlinks=True)
            if outcome.ended != "returned" and kind != "disk full":  # the next save succeeds
                self.save()
                self.check_only(self.new)
        return {"calls": at - 1, "states": sorted(seen)}

    def without_rights(self) -> None:
        restore(top / "new", self.old)
        directory.chmod(0o500)
        outcome = attempt(self.save, Fault(top / "elsewhere"), as_owner_only=True)
        directory.chmod(0o700)
        assert (outcome.ended, outcome.error) == ("raised", "PermissionError"), outcome
        assert "get permission to write" in outcome.message and str(directory) in outcome.message, outcome
        self.check_only(self.old)

    def save(self) -> None:
        save(self.model)


def lacking(*args, **kwargs):
    raise OSError(errno.EPERM, "not on this file system")


results = {}
for name in sys.argv[3:]:
    before, lacks = name.split(",")
    case = Case(before, lacks)
    with mock.patch.object(*LACKING.get(lacks, (case, "lacks")), lacking if lacks in LACKING else lacks):
        results[name] = {kind: case.tries(kind) for kind in ("kill", "disk full", "read-only")}
        if case.old is not None:
            case.without_rights()
    results[name]["left"] = case.leftovers
print(json.dumps(results))
