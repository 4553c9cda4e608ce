"""DoRA adapters and the commands on checkpoints: merged as in memory and by PEFT, or refused by name."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import merged_by_peft, peft_adapter, save_checkpoint, tensors_of
from support.models import bert, gpt2, llama
from torch import nn

from lora_ext import load_adapter
from lora_ext.adapters import merge_and_unload
from lora_ext.checkpoints import inspect, merge, unmerge
from lora_ext.checkpoints import merged_rows as merging

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def files(tmp_path):
    """``base`` and a DoRA adapter of its first layer of two, whose magnitudes differ from the weight's norms."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "ab"})
    save_checkpoint(model.state_dict(), tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", target_modules=["a"], use_dora=True)
    change(tmp_path / "adapter", lambda tensors: tensors["base_model.model.a.lora_magnitude_vector"].mul_(1.5))
    return tmp_path


def change(directory, edit):
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("family", [bert, llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_as_by_peft_and_in_memory(family, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK_BYTES", 200)  # a few rows
    model = family().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    adapted = peft_adapter(copy.deepcopy(model), tmp_path / "adapter", target_modules="all-linear", use_dora=True)
    change(tmp_path / "adapter", lambda tensors: [t.mul_(1.5) for key, t in tensors.items() if "magnitude" in key])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= 1.5
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify=True)
    assert report.merged > 4 and report.verified
    merged = type(model).from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    eps = torch.finfo(dtype).eps
    for key, tensor in merged_by_peft(adapted).items():
        torch.testing.assert_close(merged[key], tensor, rtol=4 * eps, atol=2 * eps)
    in_memory = merge_and_unload(load_adapter(model, tmp_path / "adapter")).state_dict()
    for key, tensor in in_memory.items():
        torch.testing.assert_close(merged[key], tensor, rtol=2 * eps, atol=2 * eps)


def test_another_dtype_and_a_second_adapter_elsewhere(files):
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "ab"})
    peft_adapter(model, files / "other", target_modules=["b"])
    merge(files / "base", [files / "adapter", files / "other"], files / "out", dtype=torch.bfloat16)
    merge(files / "base", [files / "adapter"], files / "alone")
    together, alone = tensors_of(files / "out"), tensors_of(files / "alone")
    assert torch.equal(together["a.weight"], alone["a.weight"].bfloat16())
    assert not torch.equal(together["b.weight"], alone["b.weight"].bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"record": True}, r"is a DoRA adapter \(use_dora\), whose merge on disk cannot be undone; keep the base"),
        ({"subtract": True}, r"unmerge: .*whose merge on disk cannot be undone; take the base"),
    ],
)
def test_what_cannot_be_undone(files, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge(files / "base", [files / "adapter"], files / "out", **arguments)
    assert not (files / "out").exists()


def test_two_adapters_of_one_weight(files):
    shutil.copytree(files / "adapter", files / "second")
    change(files / "second", lambda tensors: tensors["base_model.model.a.lora_magnitude_vector"].mul_(2))
    with pytest.raises(ValueError, match=r"a.weight: .*adapter is a DoRA adapter .use_dora., which is merged without"):
        merge(files / "base", [files / "adapter", files / "second"], files / "out")


def test_weights_whose_columns_are_the_outputs(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", target_modules=["c_attn"], use_dora=True)
    with pytest.raises(ValueError, match=r"c_attn.weight is \[in, out\], and a DoRA adapter .*merge_and_unload"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("base_model.model.a.lora_magnitude_vector"), "a has no lora_magnitude_vector"),
        (
            lambda t: t.update({"base_model.model.a.lora_magnitude_vector": torch.ones(3)}),
            r"shape of base_model.model.a.lora_magnitude_vector: \[3\], want \[7\] numbers",
        ),
        (lambda t: t["base_model.model.a.lora_magnitude_vector"].fill_(torch.nan), "a.weight would have values that"),
    ],
)
def test_damaged_files(files, edit, message):
    change(files / "adapter", edit)
    with pytest.raises(ValueError, match=message):
        merge(files / "base", [files / "adapter"], files / "out")
    assert not (files / "out").exists()


def test_magnitudes_of_a_config_without_dora(files):
    config = json.loads((files / "adapter" / "adapter_config.json").read_text())
    (files / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(ValueError, match="a has a lora_magnitude_vector, but the config's use_dora is False"):
        merge(files / "base", [files / "adapter"], files / "out")


def test_inspecting(files):
    (layer,) = inspect(files / "adapter")["layers"]
    assert layer["parameters"] == layer["r"] * (9 + 7) + 7


def test_a_merged_adapter_is_not_subtracted(files):
    merge(files / "base", [files / "adapter"], files / "out")
    with pytest.raises((ValueError, FileNotFoundError)):
        unmerge(files / "out", files / "back")
    assert not (files / "back").exists()
