"""Every command that reads a bad checkpoint says which file it is in one line, and writes nothing.

tests/files/test_reading.py has more kinds of bad JSON, headers and files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import INDEX, SHARD, add_tensor

from lora_ext.checkpoints import Checkpoint
from lora_ext.commands import main

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")

COMMANDS = {
    "merge": ["merge", "--base", "{bad}", "--adapter", "{adapter}", "--out", "{out}"],
    "extract": ["extract", "--base", "{base}", "--tuned", "{bad}", "--out", "{out}", "--r", "2"],
    "inspect": ["inspect", "{bad}"],
}


def run(name: str, files: Path, folder: Path, capsys) -> tuple[int, str]:
    """Runs a command on ``folder / "bad"``; returns the exit status and the error. A failing one writes nothing."""
    paths = {"base": files / "base", "adapter": files / "adapter", "bad": folder / "bad", "out": folder / "out"}
    before = sorted(path.name for path in folder.iterdir())
    status = main([part.format(**paths) for part in COMMANDS[name]])
    printed = capsys.readouterr()
    assert (printed.out + printed.err).replace("\n", "").isprintable(), printed
    said = printed.err.partition(" error: ")[2]
    assert status == 0 or (said.count("\n") == 1 and len(said) < 1000), said
    if status == 2:
        assert sorted(path.name for path in folder.iterdir()) == before
    shutil.rmtree(folder / "out", ignore_errors=True)
    return status, " ".join(said.split())


def index(**values: object) -> Callable[[Path], None]:
    """Changes values of the index."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / INDEX).read_text())
        (directory / INDEX).write_text(json.dumps(content | values))

    return damage


def named(name: object, key: str = "a.weight") -> Callable[[Path], None]:
    """Makes an index that assigns this file to a tensor; None takes the tensor out."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / INDEX).read_text())
        content["weight_map"] |= {key: name}
        if name is None:
            del content["weight_map"][key]
        (directory / INDEX).write_text(json.dumps(content))

    return damage


def content(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(raw)


def pipe(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return damage


BAD = {
    "no weight_map": (INDEX, index(weight_map=None), "weight_map is None, want an object"),
    "weight_map list": (INDEX, index(weight_map=[1]), "weight_map is [1], want an object"),
    "weight_map empty": (INDEX, index(weight_map={}), "it names no file"),
    "metadata list": (INDEX, index(metadata=[1]), "metadata is [1], want an object"),
    "no object": (INDEX, content(INDEX, b"[]"), "holds a list, want an object"),
    "index pipe": (INDEX, pipe(INDEX), "is a pipe, want a regular file"),
    "file missing": (INDEX, named("x.safetensors"), "names files that are missing"),
    "tensor missing": (INDEX, named(SHARD, "x\x1b\n"), rf"not in {SHARD}: x\x1b\n"),
    "tensor not named": (INDEX, named(None), "not in the index: a"),
    "cut": (SHARD, lambda directory: os.truncate(directory / SHARD, 300), "is corrupted or not a safetensors file: "),
    "shard pipe": (SHARD, pipe(SHARD), "is a pipe, want a regular file"),
    "name newline": (SHARD, lambda directory: add_tensor(directory, "x\nlora-ext: fake"), r"'x\nlora-ext: fake'"),
    "four bits": (SHARD, lambda directory: add_tensor(directory, "x", "F4", (2,), 1), "the dtype F4, which PyTorch"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_index_or_shard_is_named_by_every_command(small_files, tmp_path, capsys, name):
    where, damage, message = BAD[name]
    shutil.copytree(small_files / "tuned", tmp_path / "bad")
    damage(tmp_path / "bad")
    for command in COMMANDS:
        status, printed = run(command, small_files, tmp_path, capsys)
        assert status == 2, (command, printed)
        assert message in printed and where in printed, (command, printed)


FILE_NAMES = [[], {"a": 1}, 3, "../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", "..\\x", ""]
FILE_NAMES += ["c:x.safetensors", "config.json", ".x.safetensors", "\x1b[31m.safetensors", "a\nb.safetensors"]
FILE_NAMES += ["a\0b.safetensors", "a" * 300 + ".safetensors", "a" * 10**6 + ".safetensors"]


def test_names_in_an_index_are_those_of_files_next_to_it(small_files, tmp_path):
    for number, name in enumerate(FILE_NAMES):
        bad = tmp_path / str(number)
        shutil.copytree(small_files / "tuned", bad)
        named(name)(bad)
        with pytest.raises(ValueError, match="names the file .*, want a name without a path of up to 255") as caught:
            Checkpoint.open(bad)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    shutil.copytree(small_files / "tuned", tmp_path / "good")
    longest = "a" * (255 - len(".safetensors")) + ".safetensors"
    (tmp_path / "good" / SHARD).rename(tmp_path / "good" / longest)
    text = (tmp_path / "good" / INDEX).read_text()
    (tmp_path / "good" / INDEX).write_text(text.replace(SHARD, longest))
    assert set(Checkpoint.open(tmp_path / "good")) == set(Checkpoint.open(small_files / "tuned"))


CONFIG = "config.json"
BAD_CONFIG = {
    "no object": (content(CONFIG, b"[]"), "holds a list, want an object"),
    "large": (content(CONFIG, b'{"a": "' + b"x" * (16 << 20) + b'"}'), "is larger than 16777216 bytes"),
    "text": (content(CONFIG, b'{"architectures": "LlamaForCausalLM"}'), "want a list of names"),
    "numbers": (content(CONFIG, b'{"architectures": [1]}'), "architectures is [1], want a list of names"),
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_a_bad_config_is_named_by_those_who_read_it(small_files, tmp_path, capsys, name):
    damage, message = BAD_CONFIG[name]
    shutil.copytree(small_files / "tuned", tmp_path / "bad")
    damage(tmp_path / "bad")
    for command in COMMANDS:
        status, printed = run(command, small_files, tmp_path, capsys)
        assert status == (0 if command == "inspect" else 2), printed
        assert command == "inspect" or (message in printed and str(tmp_path / "bad" / CONFIG) in printed), printed


def test_directories_that_are_no_checkpoints(small_files, tmp_path, capsys):
    def tried(message: str) -> None:
        for command in COMMANDS:
            status, printed = run(command, small_files, tmp_path, capsys)
            assert status == 2, (command, printed)
            assert str(tmp_path / "bad") in printed and message in printed, (command, printed)

    tried("is missing; want ")
    (tmp_path / "bad").mkdir()
    tried("has no model.safetensors")
    (tmp_path / "bad" / "pytorch_model\x1b[31m.bin").write_bytes(b"")
    tried("is there: save it again as safetensors")
    for name in ("x", "y"):
        save_file({"a": torch.ones(1)}, tmp_path / "bad" / f"{name}.safetensors")
    tried("has 2 safetensors files and no index")
    shutil.rmtree(tmp_path / "bad")
    os.mkfifo(tmp_path / "bad")
    tried("is a pipe, want a regular file")
    (tmp_path / "bad").unlink()
    (tmp_path / "bad").write_text("text")
    tried("is corrupted or not a safetensors file")


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
