"""A kill, a full disk or Ctrl-C at any step leaves whole files or none, and does not disturb the next save."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.checkpoints import merge

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")
STEPS = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """Ends everything: a killed process cleans nothing up."""


@contextmanager
def fault_at(number: int, fault: BaseException) -> Iterator[list[str]]:
    """Raises ``fault`` in place of the step ``number`` of those that change files; yields the steps that failed."""
    left, failed = number, []

    def counted(name: str, step: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == 0 or (left < 0 and isinstance(fault, Killed)):
                failed.append(name)
                raise fault
            return step(*arguments, **options)

        return run

    with ExitStack() as stack:
        for name in STEPS:
            stack.enter_context(mock.patch.object(os, name, counted(name, getattr(os, name))))
        yield failed


def adapted(alpha: int) -> nn.Module:
    """Makes a model whose adapter has this ``lora_alpha`` and holds only this number."""
    model = inject(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.fill_(alpha)
    return model


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


def read_merged(out: Path) -> str:
    """Returns "new" if the whole checkpoint is there, or "" if there is none."""
    if not out.exists():
        return ""
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert (out / "config.json").read_text() == "{}"
    base = load_file(out.parents[1] / "base" / "model.safetensors")
    assert not torch.equal(load_file(out / "model.safetensors")["0.weight"], base["0.weight"])
    return "new"


FAULTS = {"killed": Killed(), "full": OSError(28, "No space left on device"), "Ctrl-C": KeyboardInterrupt()}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", ["new adapter", "adapter", "merge"])
def test_files_are_whole_or_absent(case, fault, tmp_path):
    (tmp_path / "base").mkdir()
    save_file(nn.Sequential(nn.Linear(4, 4)).state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    old, new, out = adapted(5), adapted(7), tmp_path / "work" / "out"
    save_adapter(new, tmp_path / "adapter")

    def save() -> None:
        if case == "merge":
            merge(tmp_path / "base", [tmp_path / "adapter"], out)
        else:
            save_adapter(new, out)

    read = read_merged if case == "merge" else read_adapter
    found, failed = [], ["before"]
    while failed:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if case == "adapter":
            save_adapter(old, out)
        with fault_at(len(found) + 1, FAULTS[fault]) as failed:
            try:
                save()
            except (Killed, KeyboardInterrupt):
                pass
            except OSError as error:
                assert "cannot write there (No space left on device), " in str(error) and error.filename == str(out)
        found.append(read(out))
        if fault != "killed" and "rmdir" not in failed:
            assert not list(tmp_path.rglob("*.unfinished"))
        if case == "merge":
            shutil.rmtree(out, ignore_errors=True)
        save()
        assert read(out) == "new", found
    assert len(found) > 5 and found[-1] == "new"
    assert {*found} <= ({"old", "", "new"} if case == "adapter" else {"", "new"})
    assert found[0] == ("old" if case == "adapter" else "")
    if fault != "full":  # some file systems cannot make names durable, so that error is passed over
        assert found == sorted(found, key=["old", "", "new"].index)
