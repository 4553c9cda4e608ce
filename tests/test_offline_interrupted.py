"""A merge on disk that is killed, at each system call that changes files: nothing half is left, and it is continued."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from faults import run_script
from offline_files import peft_adapter, save_checkpoint, snapshot, tensors_of
from torch import nn

from lora_ext.offline import staging
from lora_ext.offline.merge import merge


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "abc"})
    peft_adapter(model, tmp_path / "adapter", target_modules=["a", "c"])
    return save_checkpoint(model.state_dict(), tmp_path / "base", shards=3), tmp_path / "adapter"


@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_a_killed_merge_leaves_nothing_half_and_is_continued(files, tmp_path, mode):
    base, adapter = files
    out = tmp_path / "out"
    if mode == "overwrite":
        save_checkpoint({"x": torch.ones(3)}, out, shards=1)
    outcome = run_script("merge_killed", base, adapter, out, mode)
    assert set(outcome["kept"]) == {0, 1, 2, 3}  # none were made twice that were complete
    assert outcome["hidden"] == []


def stop(files, out: Path, monkeypatch, after: int) -> None:
    """Leaves what a merge had written when the disk was full."""
    count = 0
    finish = staging.Staging.finish

    def finish_some(self, *names):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, "No space left on device")
        finish(self, *names)

    monkeypatch.setattr(staging.Staging, "finish", finish_some)
    with pytest.raises(OSError, match="No space left"):
        merge(files[0], [files[1]], out)
    monkeypatch.setattr(staging.Staging, "finish", finish)
    assert not out.exists()


def test_another_merge_begins_anew(files, tmp_path, monkeypatch):
    base, adapter = files
    expected = merge(base, [adapter], tmp_path / "whole") and tensors_of(tmp_path / "whole")
    out = tmp_path / "out"

    stop(files, out, monkeypatch, after=2)
    assert merge(base, [adapter], out).kept == 2
    assert snapshot(out) == snapshot(tmp_path / "whole")

    changes = {
        "options": lambda: None,
        "base": lambda: os.utime(next(base.glob("*.safetensors"))),
        "adapter": lambda: (adapter / "adapter_config.json").write_text(
            (adapter / "adapter_config.json").read_text().replace('"lora_alpha": 5', '"lora_alpha": 6')
        ),
    }
    for name, change in changes.items():
        out = tmp_path / f"out, {name}"
        stop(files, out, monkeypatch, after=2)
        change()
        report = merge(base, [adapter], out, dtype=torch.float64 if name == "options" else None)
        assert report.kept == 0, name
    assert not torch.equal(tensors_of(out)["a.weight"], expected["a.weight"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_that_was_cut_is_made_again(files, tmp_path, monkeypatch):
    base, adapter = files
    stop(files, tmp_path / "out", monkeypatch, after=2)
    shard = sorted((tmp_path / ".out.unfinished").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert merge(base, [adapter], tmp_path / "out", verify=True).kept == 1


def test_two_at_once_are_refused(files, tmp_path):
    base, adapter = files
    with (
        staging.Staging(tmp_path / "out", {"what": 1}),
        pytest.raises(RuntimeError, match=r"another process is writing .*out"),
    ):
        merge(base, [adapter], tmp_path / "out")


def test_verify_meets_a_bit_that_the_disk_changed(files, tmp_path, monkeypatch):
    base, adapter = files
    finish = staging.Staging.finish

    def finish_wrong(self, *names):
        finish(self, *names)
        for name in names:
            content = bytearray((self.path / name).read_bytes())
            content[-1] ^= 1
            (self.path / name).write_bytes(content)

    monkeypatch.setattr(staging.Staging, "finish", finish_wrong)
    with pytest.raises(RuntimeError, match=r"verify: .*model-00001-of-00003\.safetensors differs .* in the tensor"):
        merge(base, [adapter], tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
