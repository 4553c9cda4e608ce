"""The files that merge of a checkpoint writes, the memory it takes, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import (
    INDEX,
    assert_same_bits,
    peft_adapter,
    save_checkpoint,
    tensors_of,
)
from support.models import bert, llama
from support.processes import run_python

from lora_ext.checkpoints import merge

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def test_other_files_are_copied_and_other_weights_are_not(llama_files, tmp_path):
    base, adapter = llama_files
    for name in ("tokenizer.json", "1_Pooling/config.json", "modeling_own.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", "model.gguf", ".cache/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = merge(base, [adapter], tmp_path / "out")
    assert report.skipped == ["model.gguf", "pytorch_model.bin"]
    assert {name: (tmp_path / "out" / name).read_text() for name in ("tokenizer.json", "1_Pooling/config.json")} == {
        "tokenizer.json": "tokenizer.json",
        "1_Pooling/config.json": "1_Pooling/config.json",
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list((tmp_path / "out").rglob("*.bin")) + list((tmp_path / "out").rglob("x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    names = json.loads((base / INDEX).read_text())["weight_map"]
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == names


def test_shards_of_another_size(llama_files, tmp_path):
    base, adapter = llama_files
    merge(base, [adapter], tmp_path / "same")
    report = merge(base, [adapter], tmp_path / "small", shard_bytes=4000, verify=True)
    assert report.files > 3
    for file in (tmp_path / "small").glob("*.safetensors"):
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 4000 or len(tensors) == 1
    merge(base, [adapter], tmp_path / "one", shard_bytes=10**9)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    for out in ("small", "one"):
        assert_same_bits(tensors_of(tmp_path / out), tensors_of(tmp_path / "same"))
        llama().from_pretrained(tmp_path / out)


def test_a_single_file_stays_one(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", target_modules=["query"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    merge(tmp_path / "base" / "model.safetensors", [tmp_path / "adapter"], tmp_path / "lone")
    assert [path.name for path in (tmp_path / "lone").iterdir()] == ["model.safetensors"]
    assert_same_bits(tensors_of(tmp_path / "lone"), tensors_of(tmp_path / "out"))


def test_a_full_disk_is_met_before_anything_is_written(llama_files, tmp_path, monkeypatch):
    base, adapter = llama_files
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(OSError, match=r"takes 0\.00 GB more, but its disk has 0\.00 GB free"):
        merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
def test_resident_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A merge takes at most 1.5 times the largest tensor and 75 MB more than importing torch; bench_offline_merge.py
    measures a checkpoint of 2.2 GB."""
    weights = {f"layers.{i}.weight": torch.randn(2048, 4096).to(torch.bfloat16) for i in range(23)}
    weights["embed.weight"] = torch.randn(8192, 4096).to(torch.bfloat16)
    save_checkpoint(weights, tmp_path / "base", shards=6)
    total, largest = sum(t.nbytes for t in weights.values()), max(t.nbytes for t in weights.values())
    factors = {}
    for key, (rows, cols) in ((key, tensor.shape) for key, tensor in weights.items()):
        path = f"base_model.model.{key.removesuffix('.weight')}"
        if key.startswith("embed"):
            factors[f"{path}.lora_embedding_A"] = torch.randn(4, rows) * 0.01
            factors[f"{path}.lora_embedding_B"] = torch.randn(cols, 4)
        else:
            factors[f"{path}.lora_A.weight"] = torch.randn(4, cols) * 0.01
            factors[f"{path}.lora_B.weight"] = torch.randn(rows, 4)
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
report = merge(sys.argv[1], [sys.argv[2]], sys.argv[3], record=True, verify=True)
assert report.merged == 24
print(resident() - imported)
"""
    done = run_python("-c", script, *(tmp_path / name for name in ("base", "adapter", "out")))
    assert done.returncode == 0, done.stderr
    bound = 1.5 * largest + 75e6
    assert total > bound, "or a process that holds all of it would pass"
    assert 1024 * int(done.stdout) < bound
