"""Every command that reads a bad checkpoint says which file it is in one line, and writes nothing.

tests/files/test_reading.py has more kinds of bad JSON, headers and files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
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
CONFIG = "config.json"


@pytest.fixture
def fails(small_files, tmp_path, capsys) -> Callable[..., None]:
    """Checks that commands on "bad" end with one line that has these words, and write nothing."""

    def check(*words: str, commands: Iterable[str] = COMMANDS) -> None:
        paths = {name: small_files / name for name in ("base", "adapter")}
        paths |= {name: tmp_path / name for name in ("bad", "out")}
        before = sorted(path.name for path in tmp_path.iterdir())
        for command in commands:
            assert main([part.format(**paths) for part in COMMANDS[command]]) == 2
            printed = capsys.readouterr()
            assert (printed.out + printed.err).replace("\n", "").isprintable(), printed
            said = printed.err.partition(" error: ")[2]
            assert said.count("\n") == 1 and len(said) < 1000, said
            assert all(word in " ".join(said.split()) for word in words), said
            assert sorted(path.name for path in tmp_path.iterdir()) == before

    return check


Damage = Callable[[Path], object]


def index(**values: object) -> Damage:
    """Changes values of the index."""
    return lambda directory: edit(directory, lambda content: content.update(values))


def named(name: object, key: str = "a.weight") -> Damage:
    """Makes an index that assigns this file to a tensor."""
    return lambda directory: edit(directory, lambda content: content["weight_map"].update({key: name}))


def edit(directory: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((directory / INDEX).read_text())
    change(content)
    (directory / INDEX).write_text(json.dumps(content))


def content(name: str, raw: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(raw)


def pipe(name: str) -> Damage:
    return lambda directory: (directory / name).unlink() or os.mkfifo(directory / name)


BAD = {
    "no weight_map": (INDEX, index(weight_map=None), "weight_map is None, want an object"),
    "weight_map empty": (INDEX, index(weight_map={}), "it names no file"),
    "metadata list": (INDEX, index(metadata=[1]), "metadata is [1], want an object"),
    "no object": (INDEX, content(INDEX, b"[]"), "holds a list, want an object"),
    "index pipe": (INDEX, pipe(INDEX), "is a pipe, want a regular file"),
    "file missing": (INDEX, named("x.safetensors"), "names files that are missing"),
    "tensor missing": (INDEX, named(SHARD, "x\x1b\n"), rf"not in {SHARD}: x\x1b\n"),
    "tensor not named": (
        INDEX,
        lambda path: edit(path, lambda c: c["weight_map"].pop("a.weight")),
        "not in the index: a",
    ),
    "cut": (SHARD, lambda path: os.truncate(path / SHARD, 300), "is corrupted or not a safetensors file: "),
    "shard pipe": (SHARD, pipe(SHARD), "is a pipe, want a regular file"),
    "name newline": (SHARD, lambda path: add_tensor(path, "x\nlora-ext: fake"), r"'x\nlora-ext: fake'"),
    "four bits": (SHARD, lambda path: add_tensor(path, "x", "F4", (2,), 1), "the dtype F4, which PyTorch"),
    "config of a list": (CONFIG, content(CONFIG, b"[]"), "holds a list, want an object"),
    "large config": (CONFIG, content(CONFIG, b'{"a": "' + b"x" * (16 << 20) + b'"}'), "is larger than 16777216 bytes"),
    "numbers": (CONFIG, content(CONFIG, b'{"architectures": [1]}'), "architectures is [1], want a list of names"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_by_every_command_that_reads_it(small_files, tmp_path, fails, name):
    where, damage, message = BAD[name]
    shutil.copytree(small_files / "tuned", tmp_path / "bad")
    damage(tmp_path / "bad")
    fails(where, message, commands=[command for command in COMMANDS if where != CONFIG or command != "inspect"])


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


def test_directories_that_are_no_checkpoints(tmp_path, fails):
    bad = tmp_path / "bad"
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
