"""Files and directories are whole or absent, also after a kill or on a full disk; safetensors files that are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.properties import given, settings, st
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.checkpoints import merge
from lora_ext.files.reading import DTYPES, tensor_table
from lora_ext.files.writing import new_directory, stream_tensors, write_files, write_tensors

pytestmark = pytest.mark.cpu_only("is about files")


def content(directory: Path) -> dict[str, str]:
    """The text of every file below ``directory``; checks that nothing else is left there."""
    assert not [path for path in directory.rglob("*") if ".unfinished" in path.name]
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


# --- whole or absent --------------------------------------------------------------------------------------------------


def test_files_are_replaced_together(tmp_path):
    directory, names = tmp_path / "a" / "b", ("weights", "more", "config")

    def write(**texts: str) -> None:
        with write_files(directory, names, "save") as staging:
            for name, text in texts.items():
                (staging / name).write_text(text)

    write(weights="1", more="2", config="3")
    (directory / "mine").write_text("mine")
    write(weights="4", config="5")  # what is not written goes
    expected = {"a/b/weights": "4", "a/b/config": "5", "a/b/mine": "mine"}
    for error in (None, ValueError, KeyboardInterrupt):
        for failing in (directory, tmp_path / "c" / "d") if error else ():
            with pytest.raises(error), write_files(failing, names, "save") as staging:
                (staging / "weights").write_text("half")
                raise error
        assert content(tmp_path) == expected and not (tmp_path / "c").exists()


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(ValueError), new_directory(out, "merge") as staging:
        (staging / "x").write_text("half")
        assert not out.exists()
        raise ValueError
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    for path in (out, tmp_path / "empty"):
        with new_directory(path, "merge") as staging:
            (staging / "inner").mkdir()
            (staging / "inner" / "x").write_text("whole")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (out, out / "inner" / "x", tmp_path / "link"):
        wanted = pytest.raises(FileExistsError, match=f"merge: {path} exists; choose a new directory")
        with wanted, new_directory(path, "merge"):
            raise AssertionError("nothing is to be written")
    assert content(tmp_path) == {"a/out/inner/x": "whole", "empty/inner/x": "whole"}


@pytest.mark.parametrize(
    "write", [lambda path: write_files(path, ["x"], "save"), lambda path: new_directory(path, "save")]
)
def test_errors_about_what_is_read_stay_as_they_are(write, tmp_path):
    elsewhere = FileNotFoundError(2, "No such file or directory", "/other/input")
    with pytest.raises(OSError) as caught, write(tmp_path / "out"):
        raise elsewhere
    assert caught.value is elsewhere and not list(tmp_path.iterdir())


# --- safetensors ------------------------------------------------------------------------------------------------------


def test_tensors_are_written_as_the_library_reads_them(tmp_path):
    tensors = {
        "b": torch.randn(3, 4).T,
        "a": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.ones(0, 5),
        "scalar": torch.tensor(3),
    }
    os.umask(mask := os.umask(0o022))
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in tensors.items())
    for info in tensor_table(tmp_path / "x").values():
        assert info.begin % info.dtype.itemsize == 0


NAMES = st.from_regex(r"[\w. ]{0,10}", fullmatch=True).filter(str.isprintable)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@pytest.mark.full
@settings(max_examples=50, deadline=None)
@given(
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=4),
    table=st.dictionaries(NAMES, st.tuples(st.sampled_from([*DTYPES.values()]), SHAPES), max_size=5),
)
def test_every_dtype_shape_and_metadata_can_be_written(metadata, table, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in table.items()}
    stream_tensors(path, table, metadata, lambda name: torch.arange(sizes[name], dtype=torch.uint8).split(3))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(table)
        assert (file.metadata() or {}) == metadata
    for name, info in tensor_table(path).items():
        assert (info.dtype, info.shape) == table[name]
        written = path.read_bytes()[info.begin : info.begin + info.nbytes]
        assert written == bytes(i % 256 for i in range(sizes[name]))


def test_what_no_reader_would_take_is_refused(tmp_path):
    one = torch.ones(1)
    for tensors, metadata, message in (
        ({"__metadata__": one}, {}, "a tensor is called __metadata__"),
        ({"a\nb": one}, {}, "characters that cannot be printed"),
        ({"a" * 501: one}, {}, "has a name of 501 characters"),
        ({"a": torch.quantize_per_tensor(one, 1.0, 0, torch.qint8)}, {}, "which the safetensors format lacks"),
        ({"a": one}, {"a": "\udfff"}, "surrogates not allowed"),
        ({"a": one}, {"a": "x" * 100_000_000}, "more than 100000000"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tensors(tmp_path / "x", tensors, metadata)
    with pytest.raises(ValueError, match="a has 4 bytes, but 8 were announced"):
        stream_tensors(tmp_path / "x", {"a": (torch.float32, (2,))}, {}, lambda name: [one])


# --- a kill, a full disk or Ctrl-C at any step ------------------------------------------------------------------------


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
