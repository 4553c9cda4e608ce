"""inject: the layers that it adapts, the targets that it refuses, and the injected model as a module."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from support.models import Block, Net, bert, token_ids
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import lora_modules, trainable_parameter_counts
from lora_ext.nn import LoraLinear

# With init_lora_weights=False the adapter changes the output at once.
ALIVE = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}


@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_config_and_the_base_decide_about_every_layer(base):
    config = LoraConfig(**ALIVE | {"r": 4, "target_modules": ["up"], "lora_dropout": 0.25, "use_rslora": True})
    model = inject(Net().to(base), config, adapter_name="french")
    wide = base if base in (torch.float64, torch.float32) else torch.float32
    for _, layer in lora_modules(model):
        adapter = layer.adapters["french"]
        assert layer.active_adapters == ("french",)
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (4, 8, 0.25)
        assert adapter.scaling == pytest.approx(8 / math.sqrt(4))
        assert adapter.lora_B.abs().sum() > 0  # init_lora_weights=False
        assert {p.dtype for p in adapter.parameters() if p.requires_grad} == {wide}
    frozen = inject(Net(), LoraConfig(target_modules=["up"], modules_to_save=["head"], inference_mode=True))
    assert trainable_parameter_counts(frozen)[0] == 0


def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    inject(model, LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(1 for _ in lora_modules(model)) == 2


def test_odd_models():
    model = Net()
    model.get_input_embeddings = lambda: next(model.parameters())  # Perceiver answers with its latent vectors
    assert [path for path, _ in lora_modules(inject(model, LoraConfig(target_modules=["head"])))] == ["head"]

    # Inkling computes the sizes of its layers with PyTorch.
    model = nn.Sequential(nn.Linear(torch.tensor(6) // 2, torch.tensor(4), bias=False))
    assert isinstance(model[0].in_features, torch.Tensor)
    inject(model, LoraConfig(r=2, target_modules="all-linear"))
    assert [tuple(factor.shape) for factor in model[0].adapters.default.parameters()] == [(2, 3), (4, 2)]
    assert model(torch.ones(1, 3)).shape == (1, 4)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save"])
def test_an_entry_without_a_match_is_warned_about(key):
    settings = {"target_modules": ["up"], "modules_to_save": ["head"]}
    settings[key] = [*settings.get(key, []), "hea"]
    with pytest.warns(UserWarning, match=rf"{key} \['hea'\] matches no module of Net; close matches: 'head'"):
        model = inject(Net(), LoraConfig(**settings))
    assert len(list(lora_modules(model))) == 2


def test_heads_of_a_task_are_optional():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bert()
        inject(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
        inject(Net(), LoraConfig(target_modules=["up"], task_type="SEQ_CLS", modules_to_save=["classifier"]))
    assert model.classifier.in_use.weight.requires_grad


# --- shared modules and parameters ------------------------------------------------------------------------------------


def test_a_layer_in_several_places_is_one_lora_layer_everywhere():
    model = nn.Module()
    model.first = nn.Linear(3, 3)
    model.again = nn.ModuleList([model.first, nn.Linear(3, 3)])
    model.block = model.alias = Block()
    inject(model, LoraConfig(target_modules=["first", "up"]))
    assert isinstance(model.first, LoraLinear) and model.again[0] is model.first
    assert type(model.again[1]) is nn.Linear
    assert model.alias.up is model.block.up and isinstance(model.block.up.base_layer, nn.Linear)
    assert [path for path, _ in lora_modules(model)] == ["first", "block.up"]


# --- an injected model is an ordinary module --------------------------------------------------------------------------


def test_a_model_that_is_compiled_already():
    model, x = Net().eval(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    config = LoraConfig(target_modules=["up"], modules_to_save=["head"], **ALIVE)
    assert inject(compiled, config) is compiled
    assert [path for path, _ in lora_modules(model)] == ["blocks.0.up", "blocks.1.up"]
    results = []
    for call in (model, compiled):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(results[0], results[1])


def test_adapters_made_in_inference_mode_train_afterwards(tmp_path):
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], trainable_token_indices=[3])
    injected = bert()
    loaded = copy.deepcopy(injected)
    with torch.inference_mode():
        inject(injected, config)
    save_adapter(injected, tmp_path)
    with torch.inference_mode():
        load_adapter(loaded, tmp_path, trainable=True)
    for model in (injected, loaded):
        model(input_ids=token_ids()).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
