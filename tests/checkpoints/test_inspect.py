"""The layers of an adapter, read from its keys and its config: open_adapter, inspect, find_layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, merged_by_peft, peft_adapter, save_checkpoint
from support.models import llama
from torch import nn

from lora_ext.checkpoints import Checkpoint, find_layers, inspect, merge, open_adapter

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def test_biases_tokens_and_copies_of_the_base(tmp_path: Path):
    peft_adapter(EveryLayer(), tmp_path / "a", target_modules=["lin", "conv1d"], bias="all", modules_to_save=["head"])
    contents = open_adapter(tmp_path / "a")
    assert {"lin.bias", "norm.bias", "attn.out_proj.bias", "head.bias"} <= contents.replaced.keys()
    settings = {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 1]}}
    peft_adapter(llama(), tmp_path / "b", **settings)
    contents = open_adapter(tmp_path / "b")
    assert {path: len(rows) for path, rows in contents.tokens.items()} == {"model.embed_tokens": 2}
    peft_adapter(llama(), tmp_path / "c", target_modules=["lm_head"])
    assert list(open_adapter(tmp_path / "c").replaced) == ["lm_head.weight"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_equal_those_of_peft(tmp_path: Path, use_rslora: bool):
    adapted = peft_adapter(
        llama(),
        tmp_path,
        target_modules="all-linear",
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 4, "model.layers.1.mlp.(gate|down).*": 3, r"layers\.\d\.mlp\.up_proj": 5},
        alpha_pattern={"^model.layers.0.self_attn.k_proj": 7, "layers.1.self_attn.v_proj": 0.5},
    )
    updates = open_adapter(tmp_path).updates
    assert len({update.r for update in updates}) == 4
    for update in updates:
        layer = adapted.base_model.model.get_submodule(update.path)
        assert (update.r, update.scaling) == (layer.r["default"], layer.scaling["default"]), update.path


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
    kinds = dict.fromkeys(("conv1d", "conv2d", "conv3d"), "conv") | dict.fromkeys(("lin", "square"), "linear")
    kinds |= {"embed": "embedding", "experts": "parameter", "single": "parameter"}
    assert len(actual) == 9 and {layer["path"]: layer["kind"] for layer in found["layers"]} == kinds
    factors = sum(layer["parameters"] for layer in found["layers"])
    assert factors + 3 + 3 * 8 == found["parameters"]  # no tensor is left out


# --- what the analysis reads ------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    model = EveryLayer()
    settings = {"target_modules": ["lin", "square", "embed"], "target_parameters": ["experts.gate_up", "experts.down"]}
    save_checkpoint(model.state_dict(), tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", **settings)
    return tmp_path / "base", tmp_path / "adapter"


def test_factors_of_a_layer_make_the_merged_weight(files, tmp_path):
    base, adapter = files
    merge(base, [adapter], tmp_path / "merged")
    merged, contents = Checkpoint.open(tmp_path / "merged"), open_adapter(adapter)
    layers = find_layers([contents], Checkpoint.open(base))
    names = [f"{path}[{i}]" for path in ("experts", "experts.base_layer") for i in range(3)]
    assert sorted(layer.name for layer in layers) == sorted(["embed", "lin", "square", *names])
    for layer in layers:
        (update, A, B), weight = layer.factors[0], layer.weight
        assert update.shape == (len(B), A.shape[1]) and weight.transposed == (layer.name == "embed")
        delta = update.scaling * B @ A
        actual = merged.tensor(weight.key)
        actual = actual[weight.index] if actual.dim() == 3 else actual
        expected = weight.read() + (delta.T if weight.transposed else delta)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(actual, weight.read())
    assert find_layers([contents], None)[0].weight is None


def test_adapters_of_two_models_have_no_layers_in_common(tmp_path):
    for size in (8, 9):
        model = nn.ModuleDict({"a": nn.Linear(size, 8)})
        peft_adapter(model, tmp_path / str(size), target_modules=["a"])
    with pytest.raises(ValueError, match=r"not of one model.*\n  a has the shapes \[\[8, 8\], \[8, 9\]\]"):
        find_layers([open_adapter(tmp_path / "8"), open_adapter(tmp_path / "9")], None)
