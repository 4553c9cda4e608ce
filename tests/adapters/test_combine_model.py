"""Weighted combination of the adapters of a model, against PEFT's add_weighted_adapter."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import Net, bert, gpt2, refused, token_ids

from lora_ext import LoraConfig, add_weighted_adapter, inject, load_adapter, save_adapter, set_adapter
from lora_ext.adapters import adapter_names, lora_modules, trainable_parameter_counts
from lora_ext.adapters.combine import COMBINATIONS

ALIVE = {"lora_alpha": 8, "init_lora_weights": False}


def pair(base, directory, first: dict, second: dict):
    """Returns our model and PEFT's model, both with the same two adapters "one" and "two"."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**first, **ALIVE), adapter_name="one").eval()
    theirs.add_adapter("two", peft.LoraConfig(**second, **ALIVE))
    theirs.save_pretrained(directory)
    ours = copy.deepcopy(base)
    for name in ("one", "two"):
        load_adapter(ours, directory / name, adapter_name=name)
    return ours.eval(), theirs


def combine_both(ours, theirs, weights, kind, names=("one", "two"), **settings) -> None:
    """Seeds the random masks, after PEFT has drawn the initial values that it then replaces."""
    inject_adapter = theirs.base_model.inject_adapter

    def then_seed(*arguments):
        inject_adapter(*arguments)
        torch.manual_seed(0)

    theirs.base_model.inject_adapter = then_seed
    theirs.add_weighted_adapter(list(names), list(weights), "both", kind, **settings)
    theirs.set_adapter("both")
    torch.manual_seed(0)
    add_weighted_adapter(ours, list(names), list(weights), "both", kind, **settings)
    set_adapter(ours, "both")


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("weights", [(0.7, 0.5), (1.0, -0.4)], ids=str)
def test_as_in_peft(kind, weights, tmp_path):
    base, ids = bert().double().eval(), token_ids()
    settings = {"r": 3, "target_modules": ["query", "dense"]}
    ours, theirs = pair(base, tmp_path, settings, settings)
    combine_both(ours, theirs, weights, kind, density=0.5)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_with_different_layers_and_ranks(kind, tmp_path):
    base, ids = gpt2().double().eval(), token_ids()
    first = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    second = {"r": 5, "target_modules": ["c_fc", "c_attn"], "fan_in_fan_out": True, "use_rslora": True}
    ours, theirs = pair(base, tmp_path, first, second)
    combine_both(ours, theirs, (0.6, 1.5), kind)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    if kind == "cat":  # no unused rank in a layer with only one of the two
        ranks = {path.rpartition(".")[2]: layer.adapters["both"].r for path, layer in lora_modules(ours)}
        assert ranks == {"c_attn": 7, "c_proj": 2, "c_fc": 5}


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_one_adapter_is_scaled(kind, tmp_path):
    base, x = Net().double().eval(), torch.randn(5, 6, dtype=torch.float64)
    ours, theirs = pair(base, tmp_path, {"r": 2, "target_modules": ["up"]}, {"r": 2, "target_modules": ["down"]})
    combine_both(ours, theirs, [0.5], kind, names=["one"], density=0.5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_cat_is_the_sum_and_survives_a_file(tmp_path):
    base, x = Net().double().eval(), torch.randn(5, 6, dtype=torch.float64)
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["up", "down"], lora_bias=True, **ALIVE), "one")
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.adapters["one"].lora_bias.normal_()
    inject(model, LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"], **ALIVE), "two")
    with torch.no_grad():
        model.head.adapters["two"].weight.add_(1)
    expected = set_adapter(model, ["one", "two"])(x)
    assert add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "sum", "cat") is model
    assert adapter_names(model) == ["one", "two", "sum"]
    torch.testing.assert_close(model(x), expected)
    assert trainable_parameter_counts(model)[0] > 0  # as in PEFT, the active adapters stay
    torch.testing.assert_close(set_adapter(model, "sum")(x), expected)
    assert trainable_parameter_counts(model)[0] == 0
    save_adapter(model, tmp_path, "sum")
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), expected)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), expected)
    torch.testing.assert_close(set_adapter(model, ["one", "two"])(x), expected)


def test_a_layer_name_that_ends_other_names_selects_one_layer(tmp_path):
    class Names(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(6, 6)
            self.block = torch.nn.ModuleDict({"up": torch.nn.Linear(6, 6)})

        def forward(self, x):
            return self.block["up"](self.up(x))

    base, x = Names().eval(), torch.randn(5, 6)
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=r"up", **ALIVE), "one")
    set_adapter(add_weighted_adapter(model, ["one"], [2.0], "two"), "two")
    save_adapter(model, tmp_path, "two")
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_combinations():
    model = inject(Net(), LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]), "a")
    inject(model, LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"]), "b")
    for text, kind in (
        ("at 'blocks.0.up': combine: the adapters have ranks [2, 3]", "linear"),
        ("'head' is trained in full by ['a', 'b']", "cat"),
    ):
        with refused(model, ValueError, text):
            add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c", kind)
    biased = inject(Net(), LoraConfig(target_modules=["up"], bias="all"), "a")
    with refused(biased, ValueError, "'a' trains the model's own biases"):
        add_weighted_adapter(biased, ["a"], [1.0], "c")
