"""merge, unmerge and extract are killed or meet a bad disk: no partial output is left, and the next run continues."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from faults import run_script
from support.checkpoint_files import peft_adapter, save_checkpoint, snapshot, tensors_of
from torch import nn

from lora_ext.checkpoints import merge, staging

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


def make_files(folder: Path) -> tuple[Path, Path]:
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "abc"})
    peft_adapter(model, folder / "adapter", target_modules=["a", "c"])
    return save_checkpoint(model.state_dict(), folder / "base", shards=3), folder / "adapter"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return make_files(tmp_path)


# The call, and the number of files that an earlier run may have completed.
COMMANDS = {
    "merge, record": ("merge", ["base", ["adapter"]], {"record": True}, 3),
    "merge, dtype": ("merge", ["base", ["adapter"]], {"dtype": "bfloat16", "shard_bytes": 400}, 2),
    "unmerge": ("unmerge", ["recorded"], {}, 3),
    "unmerge, subtract": ("unmerge", ["merged"], {"adapters": ["adapter"]}, 3),
    "extract": ("extract", ["base", "merged"], {}, 0),
}
KINDS = ("kill", "disk full", "read-only")
FAULTS = [
    ("merge, record", "overwrite", (*KINDS, "no rights")),
    ("merge, record", "new", KINDS[:1]),
    ("merge, dtype", "new", KINDS[:1]),
    ("unmerge", "overwrite", (*KINDS, "no rights")),
    ("unmerge, subtract", "new", KINDS),
    ("extract", "overwrite", (*KINDS, "no rights")),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """The outcomes of FAULTS, by kind; one process runs them all, because imports take longer."""
    calls = []
    for name, mode, kinds in FAULTS:
        folder = tmp_path_factory.mktemp("call")
        base, adapter = make_files(folder)
        command, arguments, options, _ = COMMANDS[name]
        if command != "merge":
            merge(base, [adapter], folder / "merged")
            merge(base, [adapter], folder / "recorded", record=True)
        out = folder / "outputs" / "out"
        out.parent.mkdir()
        if mode == "overwrite" and command == "extract":
            shutil.copytree(adapter, out, ignore=shutil.ignore_patterns("README.md"))
        elif mode == "overwrite":
            save_checkpoint({"x": torch.ones(3)}, out, shards=1)
        call = {"command": command, "arguments": absolute(folder, arguments), "kinds": kinds}
        call["options"] = {key: absolute(folder, value) for key, value in options.items()}
        calls.append(call | {"out": str(out), "overwrite": mode == "overwrite"})
    file = tmp_path_factory.mktemp("calls") / "calls.json"
    file.write_text(json.dumps(calls))
    return run_script("offline_commands", file)


def absolute(folder: Path, value):
    if isinstance(value, list):
        return [absolute(folder, one) for one in value]
    return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{name}, {mode}" for name, mode, _ in FAULTS])
def test_each_call_that_changes_files_meets_each_fault(outcomes, number):
    name, _, kinds = FAULTS[number]
    found, most_kept = outcomes[number], COMMANDS[name][3]
    assert tuple(found) == kinds
    for kind in [kind for kind in KINDS if kind in found]:
        assert found[kind]["calls"] >= 10
        if kind != "read-only":
            assert set(found[kind]["kept"]) == set(range(most_kept + 1)), kind  # complete files were not made again
    assert found["kill"]["left"] > 0


def stop(files, out: Path, monkeypatch, after: int, killed: bool = False, **options) -> None:
    """Leaves the files of a merge whose disk was full, or that was killed."""
    count = 0
    finish = staging.Staging.finish

    def finish_some(self, *names):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, "No space left on device")
        finish(self, *names)

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "finish", finish_some)
        if killed:
            patch.setattr(staging.Staging, "__exit__", lambda self, *error: self._unlock())
        with pytest.raises(OSError, match="No space left"):
            merge(files[0], [files[1]], out, **options)
    assert not out.exists()


def test_another_merge_starts_from_the_beginning(files, tmp_path, monkeypatch):
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


# --- the hidden directory ---------------------------------------------------------------------------------------------


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_without_an_exchange_the_old_output_is_put_back(files, tmp_path, monkeypatch):
    """Replaces a directory on a file system that cannot exchange two."""
    base, adapter = files
    out = tmp_path / "out"
    save_checkpoint({"x": torch.ones(3)}, out, shards=1)
    old = snapshot(out)
    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    rename = os.rename

    def rename_once(source, target):
        if Path(source).name == ".out.unfinished":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(OSError, match=r"out cannot be written: Input/output error"):
        merge(base, [adapter], out, overwrite=True)
    assert snapshot(out) == old

    class Killed(BaseException):
        """Ends the run at once, as far as this is possible within a process."""

    def killed(source, target):
        if Path(source).name == ".out.unfinished":
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "__exit__", lambda self, *error: self._unlock())
        merge(base, [adapter], out, overwrite=True)
    assert not out.exists()
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(FileExistsError, match="out exists"):
        merge(base, [adapter], out)
    assert snapshot(out) == old  # it was put back
    assert merge(base, [adapter], out, overwrite=True).kept == 3
    assert "a.weight" in tensors_of(out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_link_or_another_users_directory_is_not_used(files, tmp_path, monkeypatch):
    base, adapter = files
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dear").write_text("dear")
    hidden = tmp_path / ".out.unfinished"
    hidden.symlink_to(tmp_path / "home")
    with pytest.raises(NotADirectoryError, match=r"out cannot be written: .*unfinished"):
        merge(base, [adapter], tmp_path / "out")
    hidden.unlink()
    hidden.mkdir()
    (hidden / "x").write_text("theirs")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match=r"it belongs to another user; choose another directory"):
        merge(base, [adapter], tmp_path / "out")
    assert (tmp_path / "home" / "dear").read_text() == "dear"
    assert (hidden / "x").read_text() == "theirs"


@pytest.mark.parametrize(
    "journal",
    ["", "[]", "{}", '{"what": 1, "files": []}', '{"what": {}, "directory": [1, 2], "files": {"a": 1}}', "[" * 10**6],
)
def test_a_journal_that_is_wrong_is_not_trusted(files, tmp_path, monkeypatch, journal):
    base, adapter = files
    expected = merge(base, [adapter], tmp_path / "whole") and snapshot(tmp_path / "whole")
    stop(files, tmp_path / "out", monkeypatch, after=2)
    (tmp_path / ".out.unfinished.json").write_text(journal)
    assert merge(base, [adapter], tmp_path / "out").kept == 0
    assert snapshot(tmp_path / "out") == expected
    stop(files, tmp_path / "again", monkeypatch, after=2)
    (tmp_path / ".again.unfinished.json").unlink()
    os.mkfifo(tmp_path / ".again.unfinished.json")
    assert merge(base, [adapter], tmp_path / "again").kept == 0


def test_files_of_another_merge_are_not_taken_for_finished_ones(files, tmp_path, monkeypatch):
    """The other run had the same names and sizes, and was killed before its first journal."""
    base, adapter = files
    expected = merge(base, [adapter], tmp_path / "whole") and snapshot(tmp_path / "whole")
    stop(files, tmp_path / "out", monkeypatch, after=2)
    shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 50}
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    stop((base, tmp_path / "other"), tmp_path / "out", monkeypatch, after=0, killed=True)
    shards = sorted((tmp_path / ".out.unfinished").glob("*.safetensors"))
    assert [shard.stat().st_size for shard in shards] == [(tmp_path / "whole" / shards[0].name).stat().st_size]
    assert merge(base, [adapter], tmp_path / "out").kept == 0
    assert snapshot(tmp_path / "out") == expected


def test_leftovers_are_removed_by_a_run_of_another_kind(files, tmp_path, monkeypatch):
    """No directory for a record stays: it would look like a record."""
    base, adapter = files
    stop(files, tmp_path / "out", monkeypatch, after=1, record=True)
    assert (tmp_path / ".out.unfinished" / "merge_record").is_dir()
    merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out" / "merge_record").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_directories_that_were_made_for_it_go_with_it(files, tmp_path):
    base, adapter = files
    before = tree(tmp_path)
    for name in ("b" * 250, "c" * 240, "d/" + "e" * 250):
        with pytest.raises(OSError, match=r"File name too long; choose a shorter name"):
            merge(base, [adapter], tmp_path / "new" / name)
        assert tree(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written: Not a directory"):
        merge(base, [adapter], tmp_path / "file" / "out")


def test_old_output_that_cannot_be_removed_is_named(files, tmp_path, monkeypatch):
    base, adapter = files
    out = tmp_path / "out"
    save_checkpoint({"x": torch.ones(3)}, out, shards=1)

    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        with pytest.raises(
            RuntimeError, match=r"out is complete, but .*\.out\.unfinished is left and has to be removed"
        ):
            merge(base, [adapter], out, overwrite=True)
    assert "a.weight" in tensors_of(out)
    assert "x" in tensors_of(tmp_path / ".out.unfinished")
    merge(base, [adapter], out, overwrite=True)
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_run_that_begins_at_the_same_time_removes_nothing(files, tmp_path, monkeypatch):
    """The run first finds no hidden directory, and then one that another process has just made."""
    base, adapter = files
    with staging.Staging(tmp_path / "out", {"what": 1}) as first:
        (first.path / "shard").write_text("of the first")
        real, calls = staging.Staging._open, []

        def open_later(self):
            calls.append(self)
            return None if len(calls) == 1 else real(self)

        monkeypatch.setattr(staging.Staging, "_open", open_later)
        with pytest.raises(RuntimeError, match="another process is writing"):
            merge(base, [adapter], tmp_path / "out")
        assert (first.path / "shard").read_text() == "of the first"
