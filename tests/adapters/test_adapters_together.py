"""Adapters that meet in one module: neither may change the other."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import VOCABULARY, Net, llama, refused
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.adapters import delete_adapter, disable_adapters, merge_and_unload, set_adapter, unload


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapters." in path:
                parameter.normal_(std=0.3)
    return model


def computed(model: nn.Module, x: Tensor, *names: str) -> Tensor:
    return set_adapter(model, names)(x).detach()


def square() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()


@pytest.mark.parametrize("saved_first", [False, True])
def test_one_adapter_trains_a_module_in_full_that_another_adapts(saved_first):
    x, base = torch.randn(3, 6), square()
    adapting = LoraConfig(r=2, target_modules=["2"])
    saving = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    wanted = {}
    for name, config in (("adapting", adapting), ("saving", saving)):
        torch.manual_seed(7)
        wanted[name] = randomized(inject(copy.deepcopy(base), config, name))(x).detach()

    model, order = copy.deepcopy(base), [("adapting", adapting), ("saving", saving)]
    for name, config in reversed(order) if saved_first else order:
        torch.manual_seed(7)
        alone = randomized(inject(copy.deepcopy(base), config, name))
        inject(model, config, name)
        single, theirs = dict(alone.named_parameters()), dict(model.named_parameters())
        with torch.no_grad():
            for path, parameter in theirs.items():
                if f".adapters.{name}." in path:
                    parameter.copy_(single[path.replace("2.base_layer.", "2.")])
    for name, y in wanted.items():
        assert torch.equal(computed(model, x, name), y), name
    assert torch.equal(computed(model, x), base(x))
    set_adapter(model, "adapting")
    assert torch.equal(unload(model)(x), base(x))


def test_a_block_trained_in_full_is_copied_without_the_adapters_in_it(tmp_path):
    x, base = torch.randn(3, 6), Net().eval()
    model = randomized(inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["up"]), "a"))
    adapted = computed(model, x, "a")
    inject(model, LoraConfig(r=2, target_modules=["head"], modules_to_save=["blocks.0"]), "b")
    torch.testing.assert_close(model(x), base(x))
    assert torch.equal(computed(model, x, "a"), adapted)
    for name in "ab":
        save_adapter(model, tmp_path / name, name)
    assert torch.equal(unload(model)(x), base(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize("saved_first", [False, True])
def test_the_output_projection_of_an_attention_that_another_adapter_trains_in_full(saved_first, tmp_path):
    x, base = torch.randn(2, 3, 8), Attention().eval()
    model = copy.deepcopy(base)
    adapting = LoraConfig(r=2, target_modules=["out_proj"])
    saving = LoraConfig(r=2, target_modules=["attn"], modules_to_save=["out_proj"])
    for name, config in sorted({"adapting": adapting, "saving": saving}.items(), reverse=saved_first):
        inject(model, config, name)
    randomized(model)
    for name in ("adapting", "saving"):
        expected = computed(model, x, name)
        assert not torch.allclose(expected, base(x))
        save_adapter(model, tmp_path / name, name)
        torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path / name)(x), expected)
        torch.testing.assert_close(merge_and_unload(copy.deepcopy(model))(x), expected)
    expected = computed(model, x, "adapting")
    torch.testing.assert_close(delete_adapter(model, "saving")(x), expected)
    assert type(unload(model).attn) is nn.MultiheadAttention


def test_a_bias_in_two_modules_is_switched_once(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **size)).eval()
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    inject(model, LoraConfig(r=2, target_modules=["query"], bias="all"))
    nn.init.constant_(head.bias, 3.0)
    with disable_adapters(model):
        assert not head.bias.any()
    assert (head.bias == 3).all()
    save_adapter(set_adapter(model, ()), tmp_path, "default")
    assert not head.bias.any()
    again = load_adapter(unload(model), tmp_path)
    assert (again.cls.predictions.bias == 3).all()


def test_no_lora_bias_is_merged_into_a_trained_bias():
    x, model = torch.randn(3, 6), Net().eval()
    inject(model, LoraConfig(r=2, target_modules=["up"], bias="all"), "a")
    inject(model, LoraConfig(r=2, target_modules=["up"], lora_bias=True), "b")
    randomized(model)
    with refused(
        model,
        ValueError,
        "merge: the lora_bias of 'blocks.0.up' would go into a bias",
        "'a' trains",
        "merge_and_unload",
    ):
        merge(model, "b")
    expected = model(x)
    torch.testing.assert_close(merge_and_unload(model)(x), expected)


def test_a_copy_of_a_disabled_model_is_enabled():
    x, model = torch.randn(3, 6), Net().eval()
    expected = randomized(inject(model, LoraConfig(r=2, target_modules=["up"])))(x)
    with disable_adapters(model), disable_adapters(model):
        enabled = copy.deepcopy(model)
        assert not torch.allclose(model(x), expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(set_adapter(enabled, "default")(x), expected)


def test_unloading_for_good_checks_trained_rows_before_it_merges():
    model = llama()
    for name in "ab":
        inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]), name)
    set_adapter(randomized(model), ["a", "b"])
    with refused(model, ValueError, "train rows for the tokens [1, 2]"):
        merge_and_unload(model)
