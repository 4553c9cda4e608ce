"""Tests ``inspect`` and ``diff``."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, merged_by_peft, peft_adapter, save_checkpoint
from support.models import llama

from lora_ext.checkpoints import diff, inspect

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def test_an_adapters_layers_with_the_norms_of_their_updates(tmp_path):
    model = EveryLayer()
    adapted = peft_adapter(model, tmp_path / "adapter", **EVERY_LAYER)
    found = inspect(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found["kind"] == "adapter"
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["dtypes"] == {"float32": found["parameters"]}
    assert found["saved"] == {"head.bias": [3], "head.weight": [3, 8]}
    merged, base = merged_by_peft(adapted), model.state_dict()
    norms = {key: (merged[key] - tensor).double().norm().item() for key, tensor in base.items()}
    expected = sorted(norm for key, norm in norms.items() if norm > 0 and not key.startswith("head"))
    actual = sorted(layer["norm"] for layer in found["layers"])
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=0)
    assert {layer["r"] for layer in found["layers"]} == {2}


def test_a_checkpoint_and_a_file(tmp_path):
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int64)}
    save_checkpoint(tensors, tmp_path / "base", shards=2)
    found = inspect(tmp_path / "base")
    assert (found["kind"], found["parameters"], found["bytes"]) == ("checkpoint", 17, 88)
    assert found["tensors"]["b"] == {"dtype": "I64", "shape": [5], "bytes": 40}
    assert len(found["files"]) == 2
    assert inspect(tmp_path / "base" / next(iter(found["files"])))["parameters"] in (12, 5)


def test_two_checkpoints(tmp_path):
    tensors = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2, 2), "i": torch.arange(3), "z": torch.zeros(2)}
    save_checkpoint(tensors | {"x": torch.ones(1)}, tmp_path / "one", shards=2)
    other = {"a": torch.tensor([3.0, 3.5]), "b": torch.ones(4), "i": torch.arange(3) + 1, "z": torch.zeros(2)}
    save_checkpoint(other | {"y": torch.ones(1)}, tmp_path / "two", shards=1)
    (tmp_path / "two" / "config.json").write_text('{"model_type": "other"}')
    found = diff(tmp_path / "one", tmp_path / "two")
    assert (found.only_a, found.only_b, found.equal) == (["x"], ["y"], 1)
    assert found.kinds == {"b": ["F32 [2, 2]", "F32 [4]"]}
    assert found.values == {"a": {"max_abs": 0.5, "relative": 0.1}, "i": {"max_abs": None, "relative": None}}
    assert found.config == {"model_type": ["own", "other"], "dtype": ["float32", "(absent)"]}
    assert not diff(tmp_path / "one", tmp_path / "one")


def test_a_sign_of_zero_and_nan_are_differences(tmp_path):
    for name, values in {"plus": [0.0, 1.0], "minus": [-0.0, 1.0], "nan": [0.0, float("nan")]}.items():
        save_checkpoint({"a": torch.tensor(values)}, tmp_path / name, shards=1)
    assert diff(tmp_path / "plus", tmp_path / "minus").values == {"a": {"max_abs": 0.0, "relative": 0.0}}
    assert math.isnan(diff(tmp_path / "plus", tmp_path / "nan").values["a"]["max_abs"])
    assert not diff(tmp_path / "nan", tmp_path / "nan")


def test_two_adapters(tmp_path):
    model = llama()
    for name in ("a", "b"):
        torch.manual_seed(0)
        peft_adapter(model, tmp_path / name, target_modules=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    config["target_modules"].reverse()
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found and found.equal == 8

    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    path = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key][0, 0] += 1
    save_file(tensors, path)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found and found.config == {"lora_alpha": [5, 9]} and list(found.values) == [key]
    save_checkpoint(dict(model.state_dict()), tmp_path / "base")
    with pytest.raises(ValueError, match="is an adapter and"):
        diff(tmp_path / "a", tmp_path / "base")


def test_missing_files(tmp_path):
    none = tmp_path / "none"
    peft_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    for read in (lambda: inspect(none), lambda: diff(none, none), lambda: diff(tmp_path / "adapter", none)):
        with pytest.raises(FileNotFoundError, match="none is missing"):
            read()
