"""Adapters in several files with an index, as Transformers writes large ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import answer, llama, refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.checkpoints import inspect

INDEX = "adapter_model.safetensors.index.json"


def shard(directory: Path, index: str = INDEX) -> list[str]:
    """Spreads an adapter's tensors over two files with an index; returns their names."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    keys = sorted(tensors)
    weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        save_file({key: tensors[key] for key in keys if weight_map[key] == name}, directory / name, {"format": "pt"})
    (directory / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return names


@pytest.fixture
def sharded(tmp_path) -> tuple[nn.Module, Tensor, Path]:
    """A bare model, the logits of the adapted one, and the adapter's directory."""
    base = llama().eval()
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    save_adapter(model, tmp_path)
    shard(tmp_path)
    return base, answer(model), tmp_path


def test_what_transformers_writes_in_several_files_loads(tmp_path, monkeypatch):
    # Transformers 5.24 asks for a PEFT that is not out yet, for loading; writing works with the installed one.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    model = llama().eval()
    base = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert len(list(tmp_path.glob("adapter_model-*.safetensors"))) > 1
    torch.testing.assert_close(answer(load_adapter(base, tmp_path)), answer(model))


@pytest.mark.parametrize("index", [INDEX, "model.safetensors.index.json"])
def test_both_names_of_the_index(index, sharded):
    base, expected, directory = sharded
    (directory / INDEX).rename(directory / index)
    torch.testing.assert_close(answer(load_adapter(base, directory)), expected)
    assert inspect(directory)
    save_adapter(base, directory / "again")
    assert (directory / "again" / "adapter_model.safetensors").is_file()


def test_the_index_of_a_model_is_not_that_of_an_adapter(sharded):
    base, expected, directory = sharded
    base.save_pretrained(directory, max_shard_size="5KB")
    assert (directory / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(answer(load_adapter(base, directory)), expected)
    (directory / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=rf"adapter_model-00001-of-00002.* is there without {INDEX}"):
        load_adapter(llama(), directory)


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda map, keys: map.update({keys[0]: "../elsewhere.safetensors"}), ValueError, "want a name without a path"),
        (lambda map, keys: map.update({keys[0]: "adapter_model.bin"}), ValueError, "want a name that ends with"),
        (lambda map, keys: map.update({keys[0]: map[keys[1]]}), ValueError, "files disagree"),
        (lambda map, keys: map.pop(keys[0]), ValueError, "not in the index: base_model"),
        (lambda map, keys: map.update({"more": map[keys[0]]}), ValueError, "more"),
        (lambda map, keys: map.clear(), ValueError, "names no file"),
        (lambda map, keys: map.update({keys[0]: "adapter_model-3.safetensors"}), FileNotFoundError, "missing"),
    ],
)
def test_a_wrong_index_is_refused(edit, error, text, sharded):
    base, _, directory = sharded
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"], sorted(index["weight_map"]))
    (directory / INDEX).write_text(json.dumps(index))
    with refused(base, error, "load_adapter: ", text):
        load_adapter(base, directory)


def test_a_whole_file_comes_before_an_index(sharded):
    base, _, directory = sharded
    other = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    save_adapter(other, directory)
    torch.testing.assert_close(answer(load_adapter(base, directory)), answer(other))
