"""Directories that are no checkpoints, and odd ones; tests/hostile has damaged files."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import INDEX, SHARD

from lora_ext.checkpoints import Checkpoint
from lora_ext.commands import main

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")

COMMANDS = {
    "merge": ["merge", "--base", "{bad}", "--adapter", "{adapter}", "--out", "{out}"],
    "extract": ["extract", "--base", "{base}", "--tuned", "{bad}", "--out", "{out}", "--r", "2"],
    "inspect": ["inspect", "{bad}"],
}


def test_directories_that_are_no_checkpoints(small_files, tmp_path, capsys):
    """Every command says which it is in one line, and writes nothing."""
    bad = tmp_path / "bad"
    paths = {"bad": bad, "out": tmp_path / "out", "base": small_files / "base", "adapter": small_files / "adapter"}

    def fails(*words: str) -> None:
        before = sorted(path.name for path in tmp_path.iterdir())
        for command in COMMANDS.values():
            assert main([part.format(**paths) for part in command]) == 2
            printed = capsys.readouterr()
            assert (printed.out + printed.err).replace("\n", "").isprintable(), printed
            said = printed.err.partition(" error: ")[2]
            assert said.count("\n") == 1 and len(said) < 1000, said
            assert all(word in " ".join(said.split()) for word in words), said
            assert sorted(path.name for path in tmp_path.iterdir()) == before

    fails(str(bad), "is missing; want ")
    bad.mkdir()
    fails(str(bad), "has no model.safetensors")
    (bad / "pytorch_model\x1b[31m.bin").write_bytes(b"")
    fails(str(bad), "is there: save it again as safetensors")
    for name in ("x", "y"):
        save_file({"a": torch.ones(1)}, bad / f"{name}.safetensors")
    fails(str(bad), "has 2 safetensors files and no index")
    shutil.rmtree(bad)
    bad.write_text("text")
    fails(str(bad), "is corrupted or not a safetensors file")


def test_the_longest_name_in_an_index(small_files, tmp_path):
    shutil.copytree(small_files / "tuned", tmp_path / "good")
    longest = "a" * (255 - len(".safetensors")) + ".safetensors"
    (tmp_path / "good" / SHARD).rename(tmp_path / "good" / longest)
    text = (tmp_path / "good" / INDEX).read_text()
    (tmp_path / "good" / INDEX).write_text(text.replace(SHARD, longest))
    assert set(Checkpoint.open(tmp_path / "good")) == set(Checkpoint.open(small_files / "tuned"))


def test_a_single_file_is_read_before_an_index(small_files, tmp_path):
    """As by Transformers."""
    shutil.copytree(small_files / "tuned", tmp_path / "both")
    save_file({"x": torch.ones(1)}, tmp_path / "both" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "both")
    assert list(checkpoint) == ["x"]
    assert SHARD in checkpoint.other_files()[1] and SHARD not in checkpoint.other_files()[0]


def test_a_name_that_is_too_long_or_has_other_letters(small_files, tmp_path, capsys):
    for path in ("x" * 5000, "x" * 300, "no\x1b[31m\nsuch", "\udcff\udcfe"):
        assert main(["inspect", str(tmp_path / path)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("lora-ext inspect: error: ") and printed.replace("\n", "").isprintable()
    strange = tmp_path / "ok\udcff\x1b"  # a name that the system allows
    shutil.copytree(small_files / "base", strange)
    main(["inspect", str(strange)])
    out = capsys.readouterr()
    assert (out.out + out.err).replace("\n", "").isprintable()
