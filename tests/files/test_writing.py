"""Files and directories are whole or absent, also after a kill or on a full disk; safetensors files that are read."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import bert, snapshot
from support.properties import given, settings, st
from torch import nn

from lora_ext import save_adapter
from lora_ext.checkpoints import merge, normalise
from lora_ext.commands.results import save_figure, write_json
from lora_ext.files.reading import DTYPES, tensor_table
from lora_ext.files.writing import new_directory, stream_tensors, write_files, write_tensors
from lora_ext.methods import apply_method, new_method, save_method

pytestmark = pytest.mark.cpu_only("is about files")


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


STEPS = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync")  # of os


class Killed(BaseException):
    """Ends everything: a killed process cleans nothing up."""


@contextmanager
def fault_at(number: int, fault: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Raises ``fault`` in place of the step ``number`` of those that change files; yields the steps that failed.

    If it is the opening of a file for writing, an empty file is left.
    """
    left, failed = number, []

    def counted(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if name == "open" and "w" not in (*arguments, "r")[1]:
                return step(*arguments, **options)
            left -= 1
            if left == 0 or (left < 0 and fault is Killed):
                failed.append(name)
                if name == "open" and left == 0:
                    step(*arguments, **options).close()
                raise fault()
            return step(*arguments, **options)

        return run

    with ExitStack() as stack:
        for module, name in (*((os, name) for name in STEPS), (io, "open"), (builtins, "open")):
            stack.enter_context(mock.patch.object(module, name, counted(name, getattr(module, name))))
        yield failed


def save_text(text: str, path: Path) -> None:
    save_figure(path, SimpleNamespace(savefig=lambda part, **_: part.write_text(text)))


def adapted(name: str, rank: int) -> nn.Module:
    torch.manual_seed(rank)
    return apply_method(bert(), new_method(name, r=rank, target_modules=["query"]))


class Case(NamedTuple):
    """Saves ``new`` to a path, where ``old`` was saved before. Without its file ``last``, readers find nothing."""

    save: Callable[[Any, Path], object]
    new: Any
    old: Any = None
    last: str = ""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("files")
    bert().save_pretrained(folder / "base")
    one, other, both = adapted("lora", 2), adapted("lora", 3), adapted("lora+adapter-h", 4)
    save_adapter(one, folder / "adapter")
    return {
        "new adapter": Case(save_adapter, one, last="adapter_config.json"),
        "adapter": Case(save_adapter, one, other, "adapter_config.json"),
        "method": Case(save_method, one, both, "method.json"),  # which has one file less
        "merge": Case(lambda adapter, out: merge(folder / "base", [adapter], out), folder / "adapter"),
        "normalise": Case(normalise, folder / "adapter"),
        "figure": Case(save_text, "new", "old"),
        "json": Case(lambda number, out: write_json(out, {"a": number}), 1, 2),
    }


FAULTS = {"killed": Killed, "full": lambda: OSError(28, "No space left on device"), "Ctrl-C": KeyboardInterrupt}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "name",
    ["new adapter", "adapter", pytest.param("method", marks=pytest.mark.full), "merge", "normalise", "figure", "json"],
)
def test_files_are_whole_or_absent(name, fault, files, tmp_path):
    case, out = files[name], tmp_path / "work" / "new" / "out"

    def begin() -> None:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        (tmp_path / "work").mkdir()
        if case.old is not None:
            out.parent.mkdir()
            case.save(case.old, out)
            if case.last:
                (out / "mine").write_text("mine")

    def content(path: Path = out) -> dict[str, bytes]:
        """Returns what readers find."""
        if not (path / case.last).exists():
            return {}
        found = snapshot(path) if path.is_dir() else {"": path.read_bytes()}
        return {name: found[name] for name in found if ".unfinished" not in name}

    begin()
    before = content()
    for path in (out, tmp_path / "fresh"):
        case.save(case.new, path)
    after = content()
    assert after == content(tmp_path / "fresh") | ({"mine": b"mine"} if "mine" in before else {}) != before
    found, failed = [], ["before"]
    while failed:
        begin()
        with fault_at(len(found) + 1, FAULTS[fault]) as failed:
            try:
                case.save(case.new, out)
            except (Killed, KeyboardInterrupt):
                pass
            except OSError as error:
                assert ("cannot write there (No space left on device), " in str(error)) == ("" not in after)
                assert error.filename == str(out) or failed == ["unlink"]
        assert content() in (before, after, {})
        found.append("after" if content() == after else "before" if content() == before else "absent")
        if fault != "killed" and "rmdir" not in failed:
            assert not list(tmp_path.rglob(".*"))
            assert not out.parent.exists() or any(path.is_file() for path in out.parent.rglob("*"))
        if not case.last:
            shutil.rmtree(out, ignore_errors=True)
        case.save(case.new, out)
        assert content() == after, found
    assert len(found) > 2 and "before" in found and found[-1] == "after"
    assert {*found} <= ({"before", "absent", "after"} if case.last else {"before", "after"})
    if fault != "full":  # some file systems cannot make names durable, so that error is passed over
        assert found == sorted(found, key=["before", "absent", "after"].index)
