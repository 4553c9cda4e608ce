"""Checkpoints and adapters that merge refuses, and changes nothing on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import (
    peft_adapter,
    refused,
    save_checkpoint,
    snapshot,
)
from support.models import bert, llama
from torch import nn

from lora_ext.checkpoints import merge
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.methods import apply_method, new_method, save_method, set_pooling

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
    packed = {key: t.view(-1, 2)[:, :1].to(torch.uint8) if "q_proj" in key else t for key, t in quantised.items()}
    save_checkpoint(packed, tmp_path / "nf4")
    words = "dtype of model.layers.0.self_attn.q_proj.weight: U8", "dequantise the base first"
    refuses(tmp_path / "nf4", [adapter], tmp_path / "out", *words)

    parts = {key.replace("weight", "_weight_qdata") if "q_proj" in key else key: t for key, t in quantised.items()}
    save_checkpoint(parts, tmp_path / "torchao")
    path = "model.layers.0.self_attn.q_proj"
    words = f"not in the base: {path}.weight; it has {path}._weight_qdata: dequantise the base first"
    refuses(tmp_path / "torchao", [adapter], tmp_path / "out", words)


def test_an_adapter_that_is_given_twice_is_refused(llama_files, tmp_path):
    base, adapter = llama_files
    (tmp_path / "link").symlink_to(adapter)
    refuses(base, [adapter, tmp_path / "link"], tmp_path / "out", "link is given twice, and its update would")


def test_a_part_of_a_method_is_refused(tmp_path):
    """The merged checkpoint would lack the rest, and answer otherwise than the trained model."""
    bert().save_pretrained(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    both = new_method("lora+prefix-embed", r=2, target_modules=["query"])
    save_method(apply_method(bert(), both), tmp_path / "both")
    refuses(base, [tmp_path / "both"], out, "both holds the low-rank part of lora+prefix-embed", "load_method")
    (tmp_path / "both" / "adapter_config.json").unlink()
    words = "adapter_config.json is missing", "method.json there is of a method without LoRA"
    refuses(base, [tmp_path / "both"], out, *words, error=FileNotFoundError)


def test_a_pooling_that_the_base_does_not_name_is_refused(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    lora = new_method("lora", r=2, target_modules=["query"])
    save_method(apply_method(set_pooling(model, "mean"), lora), tmp_path / "lora")
    words = "trained with --pooling mean", '"classifier_pooling": "mean" into', "config.json"
    refuses(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out", *words)
    path = tmp_path / "base" / "config.json"
    path.write_text(path.read_text().replace("{", '{"classifier_pooling": "mean",', 1))
    merge(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out")
    assert '"classifier_pooling": "mean"' in (tmp_path / "out" / "config.json").read_text()


def test_names_with_several_places_are_refused(tmp_path):
    model = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    peft_adapter(model, tmp_path / "adapter", target_modules=["lin"])
    weights = {f"{name}.lin.{part}": torch.ones(4, 4) for name in ("left", "right") for part in ("weight",)}
    save_checkpoint(weights, tmp_path / "base", shards=1)
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "lin.weight may be any of left.lin.weight, ri")


def test_a_head_is_not_added_under_another_prefix(tmp_path):
    model = bert()
    model.bert.save_pretrained(tmp_path / "encoder")  # without "bert." in front of its names
    peft_adapter(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    words = "it cannot be added: classifier.weight; load the base and the adapter as a model (load_adapter)"
    refuses(tmp_path / "encoder", [tmp_path / "adapter"], tmp_path / "out", words)


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


def test_no_adapter_and_a_shape_that_lies(llama_files, tmp_path):
    base, adapter = llama_files
    refuses(base, [base], tmp_path / "out", "adapter_config.json is missing", error=FileNotFoundError)
    refuses(base, [], tmp_path / "out", "no adapter is given")
    shard = sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    changed = content.replace(b'"shape":[16', b'"shape":[17', 1)
    assert changed != content
    shard.write_bytes(changed)
    refuses(base, [adapter], tmp_path / "out", f"{shard} is corrupted")


def test_overwrite_removes_nothing_but_an_older_output(llama_files, tmp_path):
    base, adapter = llama_files
    (base / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    merge(base, [adapter], out, record=True, shard_bytes=4000)
    assert len(list(out.glob("model-*"))) > 1 and (out / "merge_record").is_dir()
    merge(base, [adapter], out, overwrite=True)  # fewer files for the weights, and no record
    merge(base, [adapter], tmp_path / "new")
    assert snapshot(out) == snapshot(tmp_path / "new")
    for name in ("model-Q4.gguf", "adapter_model.safetensors", "runs/scores.json", ".git/HEAD", "link"):
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(base) if name == "link" else path.write_text("mine")
        text = f"move them, or choose another directory:\n  {name}"
        refuses(base, [adapter], out, text, error=FileExistsError, overwrite=True)
        path.unlink()
    calls = []

    def add(*_) -> None:
        calls.append((out / "notes").write_text("mine"))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FileExistsError, match="would remove; move them"):
        patch.setattr(Checkpoint, "check_unchanged", add)
        merge(base, [adapter], out, overwrite=True)
    assert calls and (out / "notes").read_text() == "mine"
    (out / "notes").unlink()
    assert merge(base, [adapter], out, overwrite=True).kept == 3  # the work of the refused run


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
    refuses(base, [adapter], tmp_path / "file", "is not a directory", error=FileExistsError, overwrite=True)

    merge(base, [adapter], tmp_path / "out", overwrite=True)
    (tmp_path / "empty").mkdir()
    merge(base, [adapter], tmp_path / "empty")
    assert snapshot(tmp_path / "empty") == snapshot(tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
