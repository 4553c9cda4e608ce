"""Tests the other files that a merge writes and copies, its memory and its progress display."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoint_files import (
    INDEX,
    add_tensor,
    assert_same_bits,
    peft_adapter,
    save_checkpoint,
    tensors_of,
)
from support.models import bert, snapshot
from support.processes import run_python
from torch import nn

from lora_ext._common import progress as displays
from lora_ext._common.progress import Progress
from lora_ext.checkpoints import Checkpoint, merge

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def test_other_files_are_copied_and_other_weights_are_not(files):
    base, out = files / "base", files / "out"
    copied = ("tokenizer.json", "1_Pooling/config.json", "modeling_own.py")
    for name in (*copied, "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", ".cache/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = merge(base, [files / "adapter"], out)
    assert report.skipped == ["model.gguf", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    weights = {path.name for path in base.glob("model*.safetensors")}
    assert snapshot(out).keys() == {*copied, *weights, "config.json", INDEX}
    assert all((out / name).read_text() == name for name in copied)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert json.loads((out / INDEX).read_text()) == json.loads((base / INDEX).read_text())
    assert sorted(path.name for path in files.iterdir()) == ["adapter", "base", "out", "tuned"]


def test_a_single_file_stays_one(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", target_modules=["query"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    merge(tmp_path / "base" / "model.safetensors", [tmp_path / "adapter"], tmp_path / "lone")
    assert [path.name for path in (tmp_path / "lone").iterdir()] == ["model.safetensors"]
    assert_same_bits(tensors_of(tmp_path / "lone"), tensors_of(tmp_path / "out"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_no_plain_number_is_copied(dtype, files, tmp_path):
    add_tensor(tmp_path / "base", "scales", "F8_E8M0", (3,), 3)
    add_tensor(tmp_path / "base", "blocks", "U8", (2, 3), 6)
    assert merge(tmp_path / "base", [files / "adapter"], tmp_path / "out", dtype=dtype).copied == 6
    before, after = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "out")
    for key in ("scales", "blocks"):
        assert after[key][:2] == before[key][:2]
        assert torch.equal(before.tensor(key).view(torch.uint8), after.tensor(key).view(torch.uint8))


def test_empty_tensors_and_values_that_are_not_finite_are_copied(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(9, 7)})
    odd = {"none": torch.ones(0), "rows": torch.ones(0, 5), "cols": torch.ones(5, 0), "scalar": torch.tensor(2.0)}
    odd["mask"] = torch.tensor([0.0, -torch.inf])
    save_checkpoint(dict(model.state_dict()) | odd, tmp_path / "base", shards=2)
    peft_adapter(model, tmp_path / "adapter", target_modules=["a"])
    for dtype in (None, torch.bfloat16):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / str(dtype), dtype=dtype)
        merged = tensors_of(tmp_path / str(dtype))
        assert_same_bits({key: merged[key] for key in odd}, {key: t.to(dtype or t.dtype) for key, t in odd.items()})


def test_links_to_files_elsewhere_are_followed(files, tmp_path):
    """The cache of the hub consists of links."""
    (tmp_path / "snapshot").mkdir()
    for path in (files / "base").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    for base, out in ((tmp_path / "snapshot", "linked"), (files / "base", "direct")):
        merge(base, [files / "adapter"], tmp_path / out)
    assert snapshot(tmp_path / "linked") == snapshot(tmp_path / "direct")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())


def test_metadata_of_each_file_is_kept(files, tmp_path):
    paths = sorted((tmp_path / "base").glob("*.safetensors"))
    for number, path in enumerate(paths):
        save_file(load_file(path), path, metadata={"format": "pt", "number": str(number), "\u00e9": "\n\x1b\u6f22"})
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    (tmp_path / "base" / INDEX).write_text(json.dumps(index | {"metadata": [1]}))  # nobody's format
    merge(tmp_path / "base", [files / "adapter"], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / INDEX).read_text()) == index
    for number, path in enumerate(paths):
        with safe_open(tmp_path / "merged" / path.name, "pt") as file:
            assert file.metadata() == {"format": "pt", "number": str(number), "\u00e9": "\n\x1b\u6f22"}


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
def test_resident_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A merge holds blocks of 8 MB; bench_offline_merge.py measures 2.2 GB."""
    weights = {f"layers.{i}": torch.randn(2048, 4096).to(torch.bfloat16) for i in range(8)}
    weights["head"] = torch.randn(8192, 4096).to(torch.bfloat16)
    save_checkpoint({f"{path}.weight": tensor for path, tensor in weights.items()}, tmp_path / "base", shards=2)
    total = sum(tensor.nbytes for tensor in weights.values())
    factors = {}
    for path, tensor in weights.items():
        factors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(4, tensor.shape[1]) * 0.01
        factors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(len(tensor), 4)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    script = """
import sys
import torch

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

imported = resident()
from lora_ext.checkpoints import merge
report = merge(sys.argv[1], [sys.argv[2]], sys.argv[3])
assert report.merged == 9
print(resident() - imported)
"""
    done = run_python("-c", script, *(tmp_path / name for name in ("base", "adapter", "out")))
    assert done.returncode == 0, done.stderr
    assert 1024 * int(done.stdout) < 75e6 < total


# --- the display of how far a command is ------------------------------------------------------------------------------


def test_a_bar_shows_the_work_and_its_note(monkeypatch, capsys):
    monkeypatch.setattr(displays, "_DELAY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("merge", 100) as shown:
        shown.note("a file")
        shown.advance(100)
    assert "merge: 100%" in (text := capsys.readouterr().err) and "a file" in text and "100/100" in text


@pytest.mark.parametrize("case", ["short", "not shown", "without tqdm"])
def test_nothing_is_shown(case, monkeypatch, capsys):
    """Work that ends within a second shows no bar, so that an error stays one line."""
    if case != "short":
        monkeypatch.setattr(displays, "_DELAY", 0.0)
    if case == "without tqdm":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with Progress("merge", 100, show=case != "not shown") as shown:
        shown.advance(100)
    assert capsys.readouterr().err == ""
