"""Files that are whole or absent, and safetensors files that the library reads."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.header_mutations import valid
from support.properties import given, settings, st

from lora_ext.files.reading import BITS, read_metadata, tensor_table
from lora_ext.files.writing import new_directory, stream_tensors, write_file, write_files, write_tensors

pytestmark = pytest.mark.cpu_only("is about files")


def texts(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_file_appears_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    for text in ("one", "two"):
        before = texts(tmp_path)
        with write_file(path) as temporary:
            temporary.write_text(text)
            assert texts(tmp_path) == before | {temporary.name: text}
        assert texts(tmp_path) == {"a": text}
    with pytest.raises(KeyboardInterrupt), write_file(path) as temporary:
        temporary.write_text("three")
        raise KeyboardInterrupt
    assert texts(tmp_path) == {"a": "two"}
    (tmp_path / "taken").mkdir()
    text = r"test: cannot write there \(Is a directory\), nothing in it was changed; free"
    with pytest.raises(OSError, match=text), write_file(tmp_path / "taken", "test") as temporary:
        temporary.write_text("four")
    assert texts(tmp_path) == {"a": "two"}


def test_files_replace_others_together(tmp_path):
    directory = tmp_path / "new" / "here"
    with write_files(directory, ("weights", "config"), "test") as staging:
        for name in ("weights", "config"):
            (staging / name).write_text("one")
    (directory / "mine").write_text("mine")
    with pytest.raises(KeyboardInterrupt), write_files(directory, ("weights", "config"), "test") as staging:
        (staging / "weights").write_text("two")
        raise KeyboardInterrupt
    assert texts(tmp_path) == {f"new/here/{name}": "one" for name in ("weights", "config")} | {"new/here/mine": "mine"}
    with write_files(directory, ("more", "weights", "config"), "test") as staging:
        (staging / "config").write_text("two")
    assert texts(directory) == {"config": "two", "mine": "mine"}  # what was not written is removed


def test_the_last_file_is_away_while_others_are_replaced(tmp_path, monkeypatch):
    for text in ("one", "two"):
        seen, replace = [], os.replace

        def watched(source, target, seen=seen, replace=replace):
            seen.append({name for name in ("weights", "config") if (tmp_path / name).exists()})
            replace(source, target)

        with monkeypatch.context() as patch, write_files(tmp_path, ("weights", "config"), "test") as staging:
            for name in ("weights", "config"):
                (staging / name).write_text(text)
            patch.setattr(os, "replace", watched)
    assert seen == [{"weights"}, {"weights"}]


def test_a_directory_appears_at_the_end_and_over_nothing(tmp_path):
    with new_directory(tmp_path / "deep" / "a", "test") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("one")
        assert not (tmp_path / "deep" / "a").exists()
    assert texts(tmp_path) == {"deep/a/inner/file": "one"}
    exists = pytest.raises(FileExistsError, match="test: .* exists; choose a new directory")
    with exists, new_directory(tmp_path / "deep" / "a", "test"):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError), new_directory(tmp_path / "empty", "test") as staging:
        (staging / "file").write_text("two")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_directory(tmp_path / "other" / "b", "test"):
        raise RuntimeError
    assert texts(tmp_path) == {"deep/a/inner/file": "one"} and not (tmp_path / "other").exists()


@pytest.mark.full
@settings(max_examples=100, deadline=None)
@given(
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=4),
    seed=st.integers(0, 2**30),
    names=st.lists(
        st.text(max_size=10).filter(lambda name: name.isprintable() and name != "__metadata__"), unique=True, max_size=5
    ),
)
def test_the_library_reads_what_is_written(metadata, seed, names, tmp_path_factory):
    rng = random.Random(seed)
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    while len(table) < len(names):
        for info in valid(rng)[0].values():
            if "dtype" in info and len(table) < len(names):
                table[names[len(table)]] = info["dtype"], tuple(info["shape"])
    path = tmp_path_factory.mktemp("written") / "x.safetensors"

    def zeros(name: str) -> torch.Tensor:
        dtype, shape = table[name]
        return torch.zeros(torch.Size(shape).numel() * BITS[dtype] // 8, dtype=torch.uint8)

    stream_tensors(path, table, metadata, zeros)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata == read_metadata(path)
        assert set(file.keys()) == set(table)
    assert {name: (info.dtype, info.shape) for name, info in tensor_table(path).items()} == table


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (["__metadata__"], {}, "a tensor is called __metadata__"),
        (["a"], {"step": 3}, r"metadata of a safetensors file must be strings, got \('step', 3\)"),
        (["a"], {"config": {"a": "b"}}, "must be strings, got"),
        (["a\ud800"], {}, "characters that cannot be printed"),
        (["a"], {"a": "\udfff"}, "are not Unicode: .*udfff"),
        (["a"], {"a": "x" * 100_000_000}, "more than 100000000"),
    ],
    ids=range(6),
)
def test_what_no_reader_would_take_is_refused(tensors, metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "x", {name: torch.zeros(1) for name in tensors}, metadata)
    with pytest.raises(ValueError, match=r"torch\.complex128, which the safetensors format lacks"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(1, dtype=torch.complex128)}, {})
    assert not (tmp_path / "x").exists()
