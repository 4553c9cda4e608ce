"""Every command that reads a bad checkpoint says which file it is, and does nothing else.

None waits, prints a traceback, lets a name write to the terminal, or writes a file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import (
    INDEX,
    SHARD,
    add_tensor,
)

from lora_ext._common.progress import Progress
from lora_ext.commands import main

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")

COMMANDS = {
    "merge": ["merge", "--base", "{bad}", "--adapter", "{adapter}", "--out", "{out}"],
    "extract": ["extract", "--base", "{base}", "--tuned", "{bad}", "--out", "{out}", "--r", "2"],
    "inspect": ["inspect", "{bad}"],
}


@pytest.fixture
def files(small_files) -> Path:
    return small_files


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Makes an endless wait fail the test."""

    def stop(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(name: str, files: Path, folder: Path, capsys) -> tuple[int, str]:
    """Runs a command on ``folder / "bad"``. Checks that a failing one writes nothing.

    Returns:
        The exit status, and the error.
    """
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


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        values = json.loads((directory / INDEX).read_text())
        changed = change(values)
        (directory / INDEX).write_text(json.dumps(values if changed is None else changed))

    return damage


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def named(name: object) -> Callable[[Path], None]:
    """Makes an index that assigns this file to a tensor."""
    return index(lambda values: values["weight_map"].update({"a.weight": name}))


def kind(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return damage


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(path.parent)  # the path of a socket must be short
        try:
            listening.bind(path.name)
        finally:
            os.chdir("/")


def tensor(*tensor: Any) -> Callable[[Path], None]:
    return lambda directory: add_tensor(directory, *tensor)


DEEP = "[" * 10**5 + "]" * 10**5
LONG = "9" * 10**5
FAR = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[9223372036854775808,9223372036854775809]}}'
BAD_INDEX = {
    "no weight_map": (index(lambda values: values.pop("weight_map") and None), "weight_map is None, want an object"),
    "weight_map list": (index(lambda values: values | {"weight_map": [1]}), "weight_map is [1], want an object"),
    "weight_map text": (index(lambda values: values | {"weight_map": "a"}), "weight_map is 'a', want an object"),
    "weight_map empty": (index(lambda values: values | {"weight_map": {}}), "it names no file"),
    "metadata list": (index(lambda values: values | {"metadata": [1]}), "metadata is [1], want an object"),
    "metadata number": (index(lambda values: values | {"metadata": 3}), "metadata is 3, want an object"),
    "no object": (text(INDEX, "[]"), "holds a list, want an object"),
    "no JSON": (text(INDEX, "{"), "is not JSON"),
    "no text": (text(INDEX, b"\xff\xfe"), "is not JSON"),
    "deep": (text(INDEX, DEEP), "more than 64 levels"),
    "deep inside": (text(INDEX, f'{{"weight_map": {{"a": {DEEP}}}}}'), "more than 64 levels"),
    "digits": (text(INDEX, f'{{"weight_map": {{"a": {LONG}}}}}'), "Exceeds the limit"),
    "twice": (text(INDEX, '{"weight_map": {}, "weight_map": {}}'), "the key 'weight_map' occurs twice"),
    "surrogate": (text(INDEX, '{"weight_map": {"a": "\\ud800"}}'), "is not Unicode"),
    "pipe": (kind(INDEX, os.mkfifo), "is a pipe, want a regular file"),
    "directory": (kind(INDEX, Path.mkdir), "is a directory, want a regular file"),
    "socket": (kind(INDEX, make_socket), "is a socket, want a regular file"),
    "device": (kind(INDEX, lambda path: path.symlink_to("/dev/zero")), "is a device, want a regular file"),
    "file unhashable": (named([]), "names the file [], want a name"),
    "file object": (named({"a": 1}), "names the file {'a': 1}, want a name"),
    "file number": (named(3), "names the file 3, want a name"),
    "file null": (named(None), "names the file None, want a name"),
    "file above": (named("../../etc/passwd"), "names the file '../../etc/passwd', want a name without a path"),
    "file absolute": (named("/etc/passwd"), "names the file '/etc/passwd', want a name without a path"),
    "file below": (named("a/b.safetensors"), "names the file 'a/b.safetensors', want a name without a path"),
    "file dots": (named(".."), "names the file '..', want a name"),
    "file backslash": (named("..\\x"), r"names the file '..\\x', want a name"),
    "file empty": (named(""), "names the file '', want a name"),
    "file drive": (named("c:x.safetensors"), "want a name without a path"),
    "file config": (named("config.json"), "want a name that ends with .safetensors"),
    "file hidden": (named(".x.safetensors"), "want a name that ends with .safetensors"),
    "file escape": (named("\x1b[31m.safetensors"), r"'\x1b[31m.safetensors'"),
    "file newline": (named("a\nb.safetensors"), r"'a\nb.safetensors'"),
    "file nul": (named("a\0b.safetensors"), r"'a\x00b.safetensors'"),
    "file long": (named("a" * 300 + ".safetensors"), "has a name of 312 characters, want at most 255"),
    "file longer": (named("a" * 10**6 + ".safetensors"), "has a name of 1000012 characters"),
    "file missing": (named("x.safetensors"), "names files that are missing"),
    "tensor missing": (
        index(lambda values: values["weight_map"].update({"x\x1b\n": SHARD})),
        rf"not in {SHARD}: x\x1b\n",
    ),
    "file left out": (
        lambda directory: shutil.copy(directory / SHARD, directory / SHARD.replace("00001", "00009")),
        "does not name all files of its checkpoint: model-00009-of-",
    ),
    "single file too": (
        lambda directory: shutil.copy(directory / SHARD, directory / "model.safetensors"),
        f"has model.safetensors and {INDEX}, which can be different weights",
    ),
    "tensor not named": (index(lambda values: values["weight_map"].pop("a.weight") and None), "not in the index: a"),
}
BAD_SHARD = {
    "empty": (text(SHARD, b""), "is corrupted or not a safetensors file: "),
    "not one": (text(SHARD, b"x" * 100), "is corrupted or not a safetensors file: "),
    "header of 2^63": (text(SHARD, struct.pack("<Q", 2**63) + b"{}"), "header too large"),
    "offsets of 2^63": (text(SHARD, struct.pack("<Q", len(FAR)) + FAR), "invalid offset for tensor `a`"),
    "deep header": (
        text(SHARD, struct.pack("<Q", len(DEEP) + 5) + b'{"a":' + DEEP.encode()),
        "is corrupted or not a safetensors file: ",
    ),
    "cut": (lambda directory: os.truncate(directory / SHARD, 300), "is corrupted or not a safetensors file: "),
    "pipe": (kind(SHARD, os.mkfifo), "is a pipe, want a regular file"),
    "directory": (kind(SHARD, Path.mkdir), "is a directory, want a regular file"),
    "socket": (kind(SHARD, make_socket), "is a socket, want a regular file"),
    "device": (kind(SHARD, lambda path: path.symlink_to("/dev/zero")), "is a device, want a regular file"),
    "loop": (kind(SHARD, lambda path: path.symlink_to(path.name)), SHARD),
    "broken link": (kind(SHARD, lambda path: path.symlink_to("none")), SHARD),
    "name newline": (tensor("x\nlora-ext: fake"), r"'x\nlora-ext: fake'"),
    "name escape": (tensor("x\x1b]0;title\x07"), r"'x\x1b]0;title\x07'"),
    "name reversed": (tensor("x\u202egnp.exe"), r"'x\u202egnp.exe'"),
    "name long": (tensor("x" * 10**5), "has a name of 100000 characters, want at most 500"),
    "huge shape of nothing": (tensor("x", "F32", (0, 2**62), 0), "x has a shape that PyTorch cannot hold"),
    "negative for PyTorch": (tensor("x", "F32", (2**63, 0), 0), "x has a shape that PyTorch cannot hold"),
    "many dimensions": (tensor("x", "U8", (1,) * 10**4, 1), "x has a shape that PyTorch cannot hold"),
}
BAD_CONFIG = {
    "no object": (text("config.json", "[]"), "holds a list, want an object"),
    "no JSON": (text("config.json", "{,}"), "is not JSON"),
    "large": (text("config.json", '{"a": "' + "x" * (16 << 20) + '"}'), "is larger than 16777216 bytes"),
    "pipe": (kind("config.json", os.mkfifo), "is a pipe, want a regular file"),
    "directory": (kind("config.json", Path.mkdir), "is a directory, want a regular file"),
    "architectures text": (text("config.json", '{"architectures": "LlamaForCausalLM"}'), "want a list of names"),
    "architectures numbers": (text("config.json", '{"architectures": [1]}'), "architectures is [1], want a list of na"),
    "architectures object": (text("config.json", '{"architectures": {"a": []}}'), "want a list of names"),
}


@pytest.mark.parametrize("case", [*((INDEX, name) for name in BAD_INDEX), *((SHARD, name) for name in BAD_SHARD)])
def test_a_bad_index_or_shard_is_named_by_every_command(files, tmp_path, capsys, case):
    where, name = case
    damage, message = (BAD_INDEX if where == INDEX else BAD_SHARD)[name]
    shutil.copytree(files / "tuned", tmp_path / "bad")
    damage(tmp_path / "bad")
    for command in COMMANDS:
        status, printed = run(command, files, tmp_path, capsys)
        assert status == 2, (command, printed)
        assert message in printed, (command, printed)
        assert f"{tmp_path / 'bad' / where}" in printed or where in printed, (command, printed)
        assert len(printed) < 2000, printed


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_a_bad_config_is_named_by_those_who_read_it(files, tmp_path, capsys, name):
    damage, message = BAD_CONFIG[name]
    shutil.copytree(files / "tuned", tmp_path / "bad")
    damage(tmp_path / "bad")
    for command in COMMANDS:
        status, printed = run(command, files, tmp_path, capsys)
        if command == "inspect":
            assert status == 0, printed
        else:
            assert status == 2, command
            assert message in printed, (command, printed)
            assert str(tmp_path / "bad" / "config.json") in printed


def test_directories_that_are_no_checkpoints(files, tmp_path, capsys):
    def tried(message: str) -> None:
        for command in COMMANDS:
            status, printed = run(command, files, tmp_path, capsys)
            assert status == 2, (command, printed)
            assert str(tmp_path / "bad") in printed
            assert message in printed, (command, printed)

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


def test_a_name_that_is_too_long_or_has_other_letters(files, tmp_path, capsys):
    for path in ("x" * 5000, "x" * 300, "no\x1b[31m\nsuch", "\udcff\udcfe"):
        assert main(["inspect", str(tmp_path / path)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("lora-ext inspect: error: ")
        assert printed.replace("\n", "").isprintable()
    strange = tmp_path / "ok\udcff\x1b"  # a name that the system allows
    shutil.copytree(files / "base", strange)
    main(["inspect", str(strange)])
    out = capsys.readouterr()
    assert (out.out + out.err).replace("\n", "").isprintable()


def test_a_file_that_becomes_shorter_while_it_is_read(files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files / "tuned", tmp_path / "bad")

    def progress_and_cut(*arguments, **options):
        os.truncate(tmp_path / "bad" / SHARD, (tmp_path / "bad" / SHARD).stat().st_size - 4)
        return Progress(*arguments, **options)

    for command, module in (("merge", "merging"), ("extract", "extraction")):
        monkeypatch.setattr(f"lora_ext.checkpoints.{module}.Progress", progress_and_cut)
        status, printed = run(command, files, tmp_path, capsys)
        assert status == 2, printed
        assert f"{SHARD} became shorter" in printed or f"{SHARD} is corrupted" in printed
        shutil.copy(files / "tuned" / SHARD, tmp_path / "bad" / SHARD)
