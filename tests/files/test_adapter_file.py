"""AdapterFile: one file, several files with an index, pickles, and files that are missing or wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, peft_adapter
from support.models import answer, llama, refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.files.adapter_file import AdapterFile

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")
INDEX = "adapter_model.safetensors.index.json"


def test_a_file_has_config_tensors_and_metadata(tmp_path):
    peft_adapter(EveryLayer(), tmp_path, **EVERY_LAYER)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    file = AdapterFile.open(tmp_path, caller="test")
    assert file.config["r"] == 2 and file.metadata == {"format": "pt"}
    assert file.path == tmp_path / "adapter_model.safetensors"
    assert sorted(file.keys()) == sorted(expected)
    for key, tensor in expected.items():
        assert key in file
        assert (file.shape(key), file.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(file.tensor(key), tensor)


def test_a_file_that_is_replaced_does_not_change_the_tensors(tmp_path):
    peft_adapter(EveryLayer(), tmp_path, **EVERY_LAYER)
    path = tmp_path / "adapter_model.safetensors"
    expected = {key: tensor.clone() for key, tensor in load_file(path).items()}
    file = AdapterFile.open(tmp_path, caller="test")
    path.unlink()
    save_file({key: tensor + 1 for key, tensor in expected.items()}, path)
    assert all(torch.equal(file.tensor(key), tensor) for key, tensor in expected.items())


def test_opening_reads_no_tensor(tmp_path):
    """A mapped file takes no memory before its bytes are used."""
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(64 << 20, dtype=torch.uint8)}, tmp_path / "adapter_model.safetensors")
    before = resident()
    file = AdapterFile.open(tmp_path, caller="test")
    assert resident() - before < 8 << 20
    assert file.tensor("a").sum() == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_missing_files_and_pickles(tmp_path):
    peft_adapter(EveryLayer(), tmp_path, **EVERY_LAYER)
    with pytest.raises(FileNotFoundError, match=r"^merge: .*none/adapter_config\.json is missing"):
        AdapterFile.open(tmp_path / "none", caller="merge")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^merge: .*adapter_model\.safetensors is missing$"):
        AdapterFile.open(tmp_path, caller="merge")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is there, .*load it with PEFT and save it again"):
        AdapterFile.open(tmp_path, caller="merge")


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"test: .*a has a dtype that torch .* lacks, F6_E2M3"):
        AdapterFile.open(tmp_path, caller="test")


# --- several files with an index, as Transformers writes large adapters ----------------------------------------------


@pytest.fixture
def sharded(tmp_path) -> tuple[nn.Module, Tensor, Path]:
    """A bare model, the logits of the adapted one, and the adapter's directory."""
    base = llama().eval()
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return base, answer(model), tmp_path


def test_what_transformers_writes_in_several_files_loads(tmp_path, monkeypatch):
    # Transformers 5.24 asks for a PEFT that is not out yet, for loading; writing works with the installed one.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    model = llama().eval()
    base = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("adapter_model-*.safetensors"))) > 1
    torch.testing.assert_close(answer(load_adapter(base, tmp_path)), answer(model))


@pytest.mark.parametrize("index", [INDEX, "model.safetensors.index.json"])
def test_both_names_of_the_index(index, sharded):
    base, expected, directory = sharded
    (directory / INDEX).rename(directory / index)
    torch.testing.assert_close(answer(load_adapter(base, directory)), expected)


def test_a_whole_file_comes_first_and_the_index_of_a_model_does_not_count(sharded):
    base, expected, directory = sharded
    llama().save_pretrained(directory, max_shard_size="5KB")
    assert (directory / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(answer(load_adapter(copy.deepcopy(base), directory)), expected)
    (directory / INDEX).rename(directory / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"adapter_model-00001-of-00002.* is there without {INDEX}"):
        load_adapter(llama(), directory)
    (directory / "elsewhere").rename(directory / INDEX)
    other = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    save_adapter(other, directory)
    torch.testing.assert_close(answer(load_adapter(base, directory)), answer(other))


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda map, keys: map.update({keys[0]: "../elsewhere.safetensors"}), ValueError, "want a name without a path"),
        (lambda map, keys: map.update({keys[0]: "adapter_model.bin"}), ValueError, "that ends with .safetensors"),
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
