"""Checkpoints and adapters that merge refuses, and changes nothing on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import (
    INDEX,
    peft_adapter,
    refused,
    save_checkpoint,
    snapshot,
)
from support.models import bert, llama
from torch import nn

from lora_ext.checkpoints import merge

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def refuses(base: Path, adapters: list[Path], out: Path, *fragments: str, error=ValueError, **options) -> None:
    with refused(out, error, *fragments):
        merge(base, adapters, out, **options)


def test_tensors_that_do_not_fit_are_listed(llama_files, tmp_path):
    _, adapter = llama_files
    bert().save_pretrained(tmp_path / "bert")
    paths = [f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    refuses(tmp_path / "bert", [adapter], tmp_path / "out", *(f"not in the base: {path}" for path in paths))

    wider = llama()
    wider.model.layers[1].mlp.up_proj = nn.Linear(16, 25, bias=False)
    save_checkpoint(wider.state_dict(), tmp_path / "wider")
    refuses(tmp_path / "wider", [adapter], tmp_path / "out", "shape of model.layers.1.mlp.up_proj.weight: [25, 16]")

    quantised = {key: t.to(torch.int8) if "q_proj" in key else t for key, t in llama().state_dict().items()}
    save_checkpoint(quantised, tmp_path / "int8")
    refuses(tmp_path / "int8", [adapter], tmp_path / "out", "dtype of model.layers.0.self_attn.q_proj.weight: I8")


def test_an_adapter_that_is_given_twice_is_refused(llama_files, tmp_path):
    base, adapter = llama_files
    (tmp_path / "link").symlink_to(adapter)
    refuses(base, [adapter, tmp_path / "link"], tmp_path / "out", "link is given twice, and its update would")


def test_names_with_several_places_are_refused(tmp_path):
    model = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    peft_adapter(model, tmp_path / "adapter", target_modules=["lin"])
    weights = {f"{name}.lin.{part}": torch.ones(4, 4) for name in ("left", "right") for part in ("weight",)}
    save_checkpoint(weights, tmp_path / "base", shards=1)
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "lin.weight may be any of left.lin.weight, ri")


def test_adapters_that_replace_the_same_are_refused(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    for name in "xy":
        peft_adapter(model, tmp_path / name, target_modules=["query"], task_type="SEQ_CLS")
    refuses(tmp_path / "base", [tmp_path / "x", tmp_path / "y"], tmp_path / "out", "classifier.weight: replaced by two")


def test_values_that_are_not_finite_are_refused(llama_files, tmp_path):
    base, adapter = llama_files
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "layers.1.self_attn.q_proj.lora_A" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)
    refuses(base, [adapter], tmp_path / "out", "layers.1.self_attn.q_proj.weight", "the adapter has NaN")
    tensors[key][0, 0] = 1e30
    save_file(tensors, path)
    refuses(base, [adapter], tmp_path / "out", "that torch.float16 cannot hold", dtype=torch.float16)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "", 3, "..\\x"])
def test_an_index_must_not_lead_out_of_its_directory(llama_files, tmp_path, name):
    base, adapter = llama_files
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (base / INDEX).write_text(json.dumps(index))
    shutil.copy(next(base.glob("*.safetensors")), tmp_path / "other.safetensors")
    refuses(base, [adapter], tmp_path / "out", f"names the file {name!r}, want a name")


def test_an_index_that_lies(llama_files, tmp_path):
    base, adapter = llama_files
    index = json.loads((base / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    moved = next(key for key, name in index["weight_map"].items() if name == names[0])
    wrong = index | {"weight_map": index["weight_map"] | {moved: names[1], "extra": names[0]}}
    (base / INDEX).write_text(json.dumps(wrong))
    refuses(base, [adapter], tmp_path / "out", f"not in {names[1]}: {moved}", f"not in {names[0]}: extra")
    (base / INDEX).write_text("[]")
    refuses(base, [adapter], tmp_path / "out", f"{INDEX} holds a list, want an object")
    (base / INDEX).write_text(json.dumps(index))
    (base / names[0]).rename(tmp_path / "elsewhere")
    refuses(base, [adapter], tmp_path / "out", f"missing:\n  {names[0]}", error=FileNotFoundError)


def test_missing_and_corrupted_checkpoints(llama_files, tmp_path):
    base, adapter = llama_files
    refuses(tmp_path / "none", [adapter], tmp_path / "out", "none is missing", error=FileNotFoundError)
    refuses(adapter, [adapter], tmp_path / "out", "has no model.safetensors", error=FileNotFoundError)
    refuses(base, [base], tmp_path / "out", "adapter_config.json is missing", error=FileNotFoundError)
    refuses(base, [], tmp_path / "out", "no adapter is given")
    shard = sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    changed = content.replace(b'"shape":[16', b'"shape":[17', 1)
    assert changed != content
    for wrong in (content[:-4], content[:20], b"", changed, b"\xff" * 100):
        shard.write_bytes(wrong)
        refuses(base, [adapter], tmp_path / "out", f"{shard} is corrupted")


def test_out_must_be_new_and_apart(llama_files, tmp_path):
    base, adapter = llama_files
    for out in (base, adapter, tmp_path):
        refuses(base, [adapter], out, "choose another directory", error=(ValueError, FileExistsError))
        refuses(base, [adapter], out, "choose another directory", overwrite=True)
    merge(base, [adapter], tmp_path / "out")
    refuses(base, [adapter], tmp_path / "out", "out exists", error=FileExistsError)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("dear")
    for overwrite, text in ((False, "notes exists"), (True, "holds no safetensors file: it is not overwritten")):
        refuses(base, [adapter], tmp_path / "notes", text, error=FileExistsError, overwrite=overwrite)
    (tmp_path / "file").write_text("dear")
    refuses(base, [adapter], tmp_path / "file", "is no directory", error=FileExistsError, overwrite=True)

    (tmp_path / "out" / "old").write_text("old")
    merge(base, [adapter], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "empty").mkdir()
    merge(base, [adapter], tmp_path / "empty")
    assert snapshot(tmp_path / "empty") == snapshot(tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
