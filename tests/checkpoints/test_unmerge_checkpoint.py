from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import (
    EVERY_LAYER,
    EveryLayer,
    assert_same_bits,
    peft_adapter,
    refused,
    save_checkpoint,
    snapshot,
    tensors_of,
)
from support.models import bert, llama
from torch import nn

from lora_ext.checkpoints import merge, record, record_writer, unmerge
from lora_ext.checkpoints import merged_rows as merging

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def refuses(merged: Path, out: Path, error: type[Exception], *fragments: str, **options) -> None:
    with refused(out, error, *fragments):
        unmerge(merged, out, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [100, 32 << 20])
def test_every_bit_of_every_layer_type_is_restored(dtype, block_bytes, tmp_path, monkeypatch):
    for module in (merging, record, record_writer):
        monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    model = EveryLayer().to(dtype)
    save_checkpoint(model.state_dict(), tmp_path / "base")
    for name in "xy":
        peft_adapter(
            model, tmp_path / name, **EVERY_LAYER | {"modules_to_save": None, "lora_alpha": 40 if name == "x" else 1}
        )
    peft_adapter(model, tmp_path / "z", target_modules=["lin"], bias="all", modules_to_save=["head"])
    adapters = [tmp_path / name for name in "xyz"]
    merge(tmp_path / "base", adapters, tmp_path / "merged", record=True, verify=True)
    base, merged = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "merged")
    merge(tmp_path / "base", adapters, tmp_path / "without")
    assert_same_bits(merged, tensors_of(tmp_path / "without"))
    assert sum(not torch.equal(merged[key], tensor) for key, tensor in base.items()) > 15
    report = unmerge(tmp_path / "merged", tmp_path / "out", verify=True)
    assert report.exact
    assert_same_bits(tensors_of(tmp_path / "out"), base)
    assert snapshot(tmp_path / "out").keys() == snapshot(tmp_path / "base").keys()
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_replaced_rows_and_added_tensors_are_undone(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[7, 0, 49])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", record=True, shard_bytes=5000)
    report = unmerge(tmp_path / "merged", tmp_path / "out")
    assert report.tensors == 3
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "base"))

    model = bert()
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("classifier")}
    save_checkpoint(tensors, tmp_path / "headless")
    peft_adapter(model, tmp_path / "classifier", target_modules=["query"], task_type="SEQ_CLS")
    merge(tmp_path / "headless", [tmp_path / "classifier"], tmp_path / "with head", record=True)
    assert "classifier.weight" in tensors_of(tmp_path / "with head")
    unmerge(tmp_path / "with head", tmp_path / "headless again")
    assert_same_bits(tensors_of(tmp_path / "headless again"), tensors_of(tmp_path / "headless"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a base, an adapter, and their merges with and without a record."""
    model = nn.ModuleDict({"a": nn.Linear(300, 20), "b": nn.Linear(9, 7)})
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=2)
    peft_adapter(model, tmp_path / "adapter", target_modules=["a", "b"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "plain")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "recorded", record=True)
    return tmp_path


def test_without_a_record_the_update_is_subtracted(files):
    report = unmerge(files / "plain", files / "out", adapters=[files / "adapter"], verify=True)
    assert not report.exact
    base, restored = tensors_of(files / "base"), tensors_of(files / "out")
    for key, tensor in base.items():
        torch.testing.assert_close(restored[key], tensor, rtol=0, atol=1e-6)
    assert not torch.equal(restored["a.weight"], base["a.weight"])


def test_merges_that_cannot_be_undone_are_refused(files):
    refuses(files / "plain", files / "out", ValueError, "plain has no merge_record", "give the adapters")
    refuses(files / "recorded", files / "out", ValueError, "has a record of its merge", adapters=[files / "adapter"])
    model = nn.ModuleDict({"a": nn.Linear(300, 20), "b": nn.Linear(9, 7)})
    peft_adapter(model, files / "full", target_modules=["a"], modules_to_save=["b"])
    refuses(files / "plain", files / "out", ValueError, "only a record has", "b.weight", adapters=[files / "full"])
    for options in ({"dtype": torch.bfloat16}, {"untie": True}):
        with pytest.raises(ValueError, match="record goes without dtype and untie"):
            merge(files / "base", [files / "adapter"], files / "out", record=True, **options)


def test_a_checkpoint_that_was_changed_since_is_refused(files):
    file = next(file for file in (files / "recorded").glob("*.safetensors") if "a.weight" in load_file(file))
    tensors = load_file(file)
    tensors["a.weight"][3, 5] += 1
    save_file(tensors, file)
    refuses(files / "recorded", files / "out", ValueError, "a.weight was changed since it was merged")


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 50])
def test_a_record_that_is_not_whole_is_refused(files, content):
    path = files / "recorded" / "merge_record" / "model-00001-of-00002.safetensors"
    path.unlink()
    if content is None:
        refuses(files / "recorded", files / "out", FileNotFoundError, str(path))
        return
    path.write_bytes(content)
    refuses(files / "recorded", files / "out", ValueError, f"{path} is corrupted")
    save_file({"x": torch.ones(1)}, path)
    refuses(files / "recorded", files / "out", ValueError, f"{path} was changed since the merge wrote it")


def test_the_record_is_small(tmp_path):
    """A record takes the factors, and at most 0.25 bytes for each element, if the update is a tenth of the weight."""
    model = nn.ModuleDict({"x": nn.Linear(512, 512, bias=False)})
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=1)
    peft_adapter(model, tmp_path / "adapter", target_modules=["x"], r=4)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: torch.randn_like(tensor) * 0.04 for key, tensor in load_file(path).items()}, path)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", record=True)
    size = sum(file.stat().st_size for file in (tmp_path / "out" / "merge_record").iterdir())
    factors = 2 * 4 * 512 * 4
    assert factors < size < factors + 0.25 * 512 * 512 + 2000
