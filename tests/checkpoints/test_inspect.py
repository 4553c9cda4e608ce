"""inspect, and the reading interface of lora_ext.checkpoints: the layers and factors of adapters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, merged_by_peft, peft_adapter, save_checkpoint
from torch import nn

from lora_ext.checkpoints import Checkpoint, find_layers, inspect, merge, open_adapter

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
    assert (found["bytes"], len(found["files"])) == (88, 2)
    assert found["tensors"]["b"] == {"dtype": "I64", "shape": [5], "bytes": 40}
    assert inspect(tmp_path / "base" / next(iter(found["files"])))["parameters"] in (12, 5)


def test_what_is_trained_next_to_the_factors_counts(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(9, 7)})
    for option in ("use_dora", "lora_bias"):
        peft_adapter(model, tmp_path / option, target_modules=["a"], **{option: True})
        (layer,) = inspect(tmp_path / option)["layers"]
        assert layer["parameters"] == layer["r"] * (9 + 7) + 7


# --- what the analysis reads ------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    model = EveryLayer()
    settings = {"target_modules": ["lin", "square", "embed"], "target_parameters": ["experts.gate_up"]}
    save_checkpoint(model.state_dict(), tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", **settings)
    return tmp_path / "base", tmp_path / "adapter"


def test_factors_of_a_layer_make_the_merged_weight(files, tmp_path):
    base, adapter = files
    merge(base, [adapter], tmp_path / "merged")
    merged, contents = Checkpoint.open(tmp_path / "merged"), open_adapter(adapter)
    layers = find_layers([contents], Checkpoint.open(base))
    names = ["embed", "experts[0]", "experts[1]", "experts[2]", "lin", "square"]
    assert sorted(layer.name for layer in layers) == names
    for layer in layers:
        factors, weight = layer.factors[0], layer.weight
        A, B = factors.read()
        assert factors.update.shape == (len(B), A.shape[1]) and weight.transposed == (layer.name == "embed")
        update = factors.update.scaling * B @ A
        actual = merged.tensor(weight.key)
        actual = actual[weight.index] if actual.dim() == 3 else actual
        expected = weight.read() + (update.T if weight.transposed else update)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(actual, weight.read())
    assert find_layers([contents], None)[0].weight is None


def test_adapters_of_two_models_have_no_layers_in_common(tmp_path):
    for size in (8, 9):
        model = nn.ModuleDict({"a": nn.Linear(size, 8)})
        peft_adapter(model, tmp_path / str(size), target_modules=["a"])
    with pytest.raises(ValueError, match=r"not of one model.*\n  a has the shapes \[\[8, 8\], \[8, 9\]\]"):
        find_layers([open_adapter(tmp_path / "8"), open_adapter(tmp_path / "9")], None)
