"""The note in a merged checkpoint which adapters it contains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import peft_adapter, refused, save_checkpoint
from support.models import llama

from lora_ext.checkpoints import diff, inspect, merge, unmerge
from lora_ext.checkpoints.merged_mark import KEY
from lora_ext.files.safetensors_format import read_header

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def marks(directory: Path) -> list[str | None]:
    return [read_header(path)[1].get(KEY) for path in sorted(directory.glob("*.safetensors"))]


def test_an_adapter_is_merged_into_a_checkpoint_once(llama_files, tmp_path):
    base, adapter = llama_files
    other = tmp_path / "other"
    peft_adapter(llama(), other, target_modules=["v_proj"])
    merge(base, [adapter], tmp_path / "once")
    with refused(tmp_path / "twice", ValueError, "is merged into", "already, as 'adapter'", "would count twice"):
        merge(tmp_path / "once", [other, adapter], tmp_path / "twice")
    merge(tmp_path / "once", [other], tmp_path / "both", shard_bytes=5000)
    assert inspect(base)["merged"] == [] and inspect(tmp_path / "both")["merged"] == ["adapter", "other"]
    assert len({*marks(tmp_path / "both")}) == 1 < len(marks(tmp_path / "both"))

    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))  # another strength of it
    merge(tmp_path / "once", [adapter], tmp_path / "stronger")


def test_unmerging_removes_the_note(llama_files, tmp_path):
    base, adapter = llama_files
    other = tmp_path / "other"
    peft_adapter(llama(), other, target_modules=["v_proj"])
    merge(base, [adapter], tmp_path / "first", record=True)
    merge(tmp_path / "first", [other], tmp_path / "second", record=True)
    unmerge(tmp_path / "second", tmp_path / "first-again")
    assert marks(tmp_path / "first-again") == marks(tmp_path / "first")
    unmerge(tmp_path / "first", tmp_path / "base-again")
    assert {*marks(tmp_path / "base-again")} == {None} and not diff(base, tmp_path / "base-again")
    for path in base.glob("*.safetensors"):
        assert (tmp_path / "base-again" / path.name).read_bytes() == path.read_bytes()

    merge(base, [adapter, other], tmp_path / "both")
    unmerge(tmp_path / "both", tmp_path / "without-other", adapters=[other])
    assert inspect(tmp_path / "without-other")["merged"] == ["adapter"]
    merge(tmp_path / "without-other", [other], tmp_path / "both-again")


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}'])
def test_a_damaged_note_is_refused(tmp_path, text):
    peft_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    save_checkpoint(llama().state_dict(), tmp_path / "base", shards=1)
    path = tmp_path / "base" / "model-00001-of-00001.safetensors"
    save_file(load_file(path), path, metadata={KEY: text})
    with refused(tmp_path / "out", ValueError, f"its metadata '{KEY}'"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_a_checkpoint_with_a_note_loads(llama_files, tmp_path):
    from transformers import AutoModelForCausalLM

    base, adapter = llama_files
    merge(base, [adapter], tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    key = "model.layers.0.self_attn.q_proj.weight"
    files = map(load_file, (tmp_path / "merged").glob("*.safetensors"))
    assert torch.equal(model.state_dict()[key], next(file[key] for file in files if key in file))
