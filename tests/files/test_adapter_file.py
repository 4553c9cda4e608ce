"""AdapterFile: config, tensors and metadata; pickles, and files that are missing or wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, peft_adapter
from support.models import answer, llama, refused

from lora_ext import load_adapter
from lora_ext.files.adapter_file import AdapterFile

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def test_a_file_has_config_tensors_and_metadata(tmp_path):
    peft_adapter(EveryLayer(), tmp_path, **EVERY_LAYER)
    expected = {key: t.clone() for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    file = AdapterFile.open(tmp_path, caller="test")
    assert file.config["r"] == 2 and file.metadata == {"format": "pt"}
    assert file.path == tmp_path / "adapter_model.safetensors"
    assert sorted(file.tensors) == sorted(expected)
    file.path.unlink()  # a file that is replaced does not change the tensors
    save_file({key: tensor + 1 for key, tensor in expected.items()}, file.path)
    torch.testing.assert_close(file.tensors, expected, rtol=0, atol=0)


def test_opening_reads_no_tensor(tmp_path):
    """A mapped file takes no memory before its bytes are used."""
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(64 << 20, dtype=torch.uint8)}, tmp_path / "adapter_model.safetensors")
    before = resident()
    file = AdapterFile.open(tmp_path, caller="test")
    assert resident() - before < 8 << 20
    assert file.tensors["a"].sum() == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_what_transformers_writes_in_several_files_is_refused(tmp_path, monkeypatch):
    # Transformers 5.24 asks for a PEFT that is not out yet, for loading; writing works with the installed one.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    model = llama().eval()
    base = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    with refused(base, FileNotFoundError, "adapter_model-00001-of-", "several files are not read", "max_shard_size"):
        load_adapter(base, tmp_path)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(load_adapter(base, tmp_path)), answer(model))
