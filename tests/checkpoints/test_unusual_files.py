"""Checkpoints that are unusual, and right: other dtypes, empty tensors, links, metadata."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import add_tensor, assert_same_bits, peft_adapter, save_checkpoint, snapshot, tensors_of
from torch import nn

from lora_ext.checkpoints import diff, extract, inspect, merge, unmerge
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.merged_mark import KEY

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


@pytest.fixture
def files(small_files) -> Path:
    return small_files


def test_dtypes_that_pytorch_lacks_are_copied(files, tmp_path):
    """These tensors are merged, recorded, restored and compared as bytes."""
    shutil.copytree(files / "base", tmp_path / "bad")
    add_tensor(tmp_path / "bad", "scales", "F8_E8M0", (3,), 3)
    add_tensor(tmp_path / "bad", "packed", "F4", (2, 6), 6)
    add_tensor(tmp_path / "bad", "six", "F6_E2M3", (4,), 3)
    report = merge(tmp_path / "bad", [files / "adapter"], tmp_path / "merged", record=True, dtype=None, verify=True)
    assert report.copied == 7
    assert unmerge(tmp_path / "merged", tmp_path / "again", verify=True).exact
    first, second = Checkpoint.open(tmp_path / "bad"), Checkpoint.open(tmp_path / "again")
    for key in ("scales", "packed", "six"):
        assert (first.info(key).dtype, first.info(key).shape) == (second.info(key).dtype, second.info(key).shape)
    assert not diff(tmp_path / "bad", tmp_path / "again")
    assert inspect(tmp_path / "bad")["tensors"]["packed"] == {"dtype": "F4", "shape": [2, 6], "bytes": 6}
    merge(tmp_path / "bad", [files / "adapter"], tmp_path / "half", dtype=torch.bfloat16)
    assert Checkpoint.open(tmp_path / "half").info("packed").dtype == "F4"


def test_tensors_of_another_dtype_are_not_replaced_by_numbers(tmp_path):
    """A quantised weight needs its scales: numbers rounded to its dtype would be wrong."""
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "ab"})
    peft_adapter(model, tmp_path / "adapter", target_modules=["a"], modules_to_save=["b"])
    for number, dtype in enumerate((torch.int8, torch.float8_e4m3fn)):
        base = tmp_path / str(number)
        tensors = dict(model.state_dict())
        save_checkpoint(tensors | {"b.weight": tensors["b.weight"].to(dtype)}, base, shards=1)
        with pytest.raises(ValueError, match=r"dtype of b\.weight: (I8|F8_E4M3), which the adapter's torch\.float32"):
            merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_tensors_and_empty_checkpoints(files, tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(9, 7)})
    nothing = {"none": torch.ones(0), "rows": torch.ones(0, 5), "cols": torch.ones(5, 0), "scalar": torch.tensor(2.0)}
    save_checkpoint(dict(model.state_dict()) | nothing, tmp_path / "base", shards=2)
    peft_adapter(model, tmp_path / "adapter", target_modules=["a"])
    for dtype in (None, torch.bfloat16):
        out = tmp_path / str(dtype)
        merge(tmp_path / "base", [tmp_path / "adapter"], out, dtype=dtype, record=dtype is None, verify=True)
        assert {key: tensors_of(out)[key].shape for key in nothing} == {key: t.shape for key, t in nothing.items()}
    assert unmerge(tmp_path / "None", tmp_path / "again").exact
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "base"))
    (tmp_path / "empty").mkdir()
    save_file({}, tmp_path / "empty" / "model.safetensors")
    assert inspect(tmp_path / "empty")["tensors"] == {}
    base, empty, x = (tmp_path / name for name in ("base", "empty", "x"))
    for call in (
        lambda: merge(empty, [tmp_path / "adapter"], x),
        lambda: extract(base, empty, x),
        lambda: extract(empty, empty, x),
        lambda: unmerge(empty, x),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match="empty"):
            call()
    assert not (tmp_path / "x").exists()


def test_links_to_files_elsewhere_are_followed(files, tmp_path):
    """The cache of the hub consists of links."""
    (tmp_path / "cache" / "snapshot").mkdir(parents=True)
    for number, path in enumerate(sorted((files / "base").iterdir())):
        shutil.copy(path, tmp_path / "cache" / f"blob {number}")
        (tmp_path / "cache" / "snapshot" / path.name).symlink_to(Path("..") / f"blob {number}")
    for base, out in ((tmp_path / "cache" / "snapshot", "linked"), (files / "base", "direct")):
        merge(base, [files / "adapter"], tmp_path / out)
    assert snapshot(tmp_path / "linked") == snapshot(tmp_path / "direct")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())


def test_metadata_of_each_file_is_kept(files, tmp_path):
    """Checks the merged and the restored checkpoint: the safetensors library reads both."""
    from safetensors import safe_open

    shutil.copytree(files / "base", tmp_path / "base")
    for number, path in enumerate(sorted((tmp_path / "base").glob("*.safetensors"))):
        save_file(load_file(path), path, metadata={"format": "pt", "number": str(number), "\u00e9": "\n\x1b\u6f22"})
    merge(tmp_path / "base", [files / "adapter"], tmp_path / "merged", record=True)
    unmerge(tmp_path / "merged", tmp_path / "again")
    for name in ("merged", "again"):
        for number, path in enumerate(sorted((tmp_path / name).glob("*.safetensors"))):
            with safe_open(path, "pt") as file:
                kept = {key: value for key, value in file.metadata().items() if key != KEY}
                assert kept == {"format": "pt", "number": str(number), "\u00e9": "\n\x1b\u6f22"}
                assert (KEY in file.metadata()) == (name == "merged")


def test_a_tensor_that_no_file_can_hold_is_not_added(files, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    shutil.copytree(files / "adapter", tmp_path / "adapter")
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.__metadata__": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="a tensor is called __metadata__, which a safetensors file cannot hold"):
        merge(files / "base", [tmp_path / "adapter"], tmp_path / "out")
    for name in ("x\x1b[31m", "x\ny", "x" * 1000):
        save_file(tensors | {f"base_model.model.{name}": torch.ones(1)}, path)
        with pytest.raises(ValueError, match="has a name") as caught:
            merge(files / "base", [tmp_path / "adapter"], tmp_path / "out")
        assert str(caught.value).isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
