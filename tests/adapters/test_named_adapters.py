"""Several adapters in one model: adding, switching, disabling, listing, and adapters that meet in one module."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import VOCABULARY, Net
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.adapters import (
    adapter_names,
    adapter_status,
    delete_adapter,
    disable_adapters,
    lora_modules,
    merge_and_unload,
    set_adapter,
    trainable_parameter_counts,
    unload,
)
from lora_ext.nn import LoraAdapter, LoraLinear

ALIVE = {"lora_alpha": 8, "init_lora_weights": False}
FIRST = LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["head"], **ALIVE)
SECOND = LoraConfig(r=3, target_modules=["up"], **ALIVE)


def three() -> Net:
    """Adds adapters a (both layers, the head), b (one layer) and c (the other layer, the head); c is active."""
    model = Net().eval()
    for name, config in (("a", FIRST), ("b", SECOND)):
        inject(model, config, name)
    return inject(model, LoraConfig(r=1, target_modules=["down"], use_rslora=True, **ALIVE), "c")


def by_hand(model: Net, x: torch.Tensor, *names: str) -> torch.Tensor:
    """The model's output with its adapters added to the weights."""
    plain = unload(copy.deepcopy(model))
    with torch.no_grad():
        for path, layer in lora_modules(model):
            for name in names:
                if name in layer.adapters:
                    plain.get_submodule(path).weight.add_(layer.delta_weight(name))
        if "a" in names:
            plain.head.load_state_dict(model.head.adapters["a"].state_dict())
    return plain(x)


# --- adding and switching ---------------------------------------------------------------------------------------------


def test_flags_of_adapters_that_the_user_changes():
    """Factors that the user froze one by one stay frozen; an adapter that was frozen as a whole trains again."""
    model = set_adapter(three(), ["a", "b"])

    def trainable() -> set[str]:
        return {path.split("adapters.")[1].split(".")[0] for path, p in model.named_parameters() if p.requires_grad}

    model.blocks[0].up.adapters["a"].lora_A.requires_grad_(False)
    set_adapter(model, ["c", "a"])
    assert not model.blocks[0].up.adapters["a"].lora_A.requires_grad
    assert model.blocks[1].up.adapters["a"].lora_A.requires_grad
    model.requires_grad_(False)
    assert set_adapter(model, ["a", "b"]) is model and trainable() == {"a", "b"}
    set_adapter(model, "b", trainable=False)
    assert trainable() == set()
    set_adapter(model, ["a", "b"])
    assert trainable() == {"a"} and model.head.adapters["a"].weight.requires_grad


def test_a_further_adapter_leaves_the_one_in_training_unless_it_is_activated(tmp_path):
    """PEFT never switches: the trained adapter would be lost without a word."""
    file, model, x = tmp_path / "file", inject(Net(), FIRST), torch.randn(5, 6)
    save_adapter(inject(Net(), SECOND), file)
    before = model(x)
    assert load_adapter(model, file, adapter_name="second") is model
    assert torch.equal(model(x), before)
    trained = [path for path, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in path for path in trained)
    assert model.training  # a reference does not turn the dropout of a training off
    save_adapter(model, tmp_path / "saved")  # that of the adapter that trains
    assert "head" in (tmp_path / "saved" / "adapter_config.json").read_text()
    for _ in range(2):  # the second time, its values are replaced
        load_adapter(model, file, adapter_name="second", activate=True)
        assert trainable_parameter_counts(model)[0] == 0 and not model.training  # as PEFT's from_pretrained does
        torch.testing.assert_close(model(x), by_hand(model, x, "second"))
        set_adapter(model, "default")
    load_adapter(model.train(), file, trainable=True, adapter_name="third", activate=True)
    assert model.training and all(".third." in path for path, p in model.named_parameters() if p.requires_grad)


# --- disabling, unloading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "merged"), [(disable_adapters, False), (unload, False), (merge_and_unload, False), (merge_and_unload, True)]
)
def test_the_plain_model(end, merged):
    base, x = Net().eval(), torch.randn(5, 6)
    model = inject(copy.deepcopy(base), SECOND, "b")
    inject(model, FIRST, "a")
    model.norm = LoraLinear(nn.Linear(6, 6), LoraAdapter(6, 6, 2, 4, init_lora_weights=False), "other")  # by hand
    base.norm = copy.deepcopy(model.norm.base_layer)
    with torch.no_grad():
        model.head.adapters["a"].weight.add_(1)
    adapted = model(x)
    if merged:
        merge(model, "a")
    if end is disable_adapters:
        with pytest.raises(KeyError, match="inner"), disable_adapters(model):
            assert torch.equal(model(x), base(x))
            raise KeyError("inner")
        assert torch.equal(model(x), adapted)
        return
    assert end(model) is model
    if end is unload:
        assert torch.equal(model(x), base(x))
        assert all(torch.equal(tensor, base.state_dict()[path]) for path, tensor in model.state_dict().items())
    else:
        torch.testing.assert_close(model(x), adapted)
        assert {path for path, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    modules = [(path, type(module)) for path, module in base.named_modules()]
    assert [(path, type(module)) for path, module in model.named_modules()] == modules
    assert sorted(vars(model)) == sorted(vars(base))
    inject(model, FIRST)  # and again


def test_a_part_of_a_model_can_be_injected_and_the_whole_unloaded():
    model = Net()
    inject(model.blocks, LoraConfig(target_modules=["up"]))
    merge_and_unload(model)
    assert not list(lora_modules(model))
    inject(model.blocks, LoraConfig(target_modules=["up"]))


# --- biases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_go_with_their_adapter(bias, tmp_path):
    base, x = Net().eval().double(), torch.randn(5, 6, dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["up", "down"], bias=bias, **ALIVE)
    model = inject(copy.deepcopy(base), config, "a")
    trained = {path for path, p in model.named_parameters() if p.requires_grad and "lora_" not in path}
    wanted = {f"blocks.{i}.up.base_layer.bias" for i in range(2)}
    assert trained == (wanted | {"norm.bias", "head.bias"} if bias == "all" else wanted)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path in trained:
                parameter.add_(1)
    adapted = model(x)
    inject(model, LoraConfig(r=3, target_modules=["up"], **ALIVE), "b")
    torch.testing.assert_close(model(x), by_hand(model, x, "b"))
    set_adapter(model, "a")
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=0)
    assert {path for path, p in model.named_parameters() if p.requires_grad and "lora_" not in path} == trained
    with disable_adapters(model):
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=0)

    set_adapter(model, "b")  # the file has a's biases nevertheless
    save_adapter(model, tmp_path, "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), adapted)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), adapted)
    other = inject(copy.deepcopy(base), SECOND, "second")
    before = other(x)
    assert torch.equal(load_adapter(other, tmp_path)(x), before)  # not in place while it is inactive
    torch.testing.assert_close(set_adapter(other, "default")(x), adapted)
    set_adapter(model, "a")
    assert torch.equal(unload(model)(x), base(x))


# --- listing --------------------------------------------------------------------------------------------------------


def test_status():
    model = set_adapter(three(), ["c"])
    merge(model, "b")
    status = {(entry.layer, entry.adapter): entry for entry in adapter_status(model)}
    assert len(status) == 4 + 2 + 2 + 1
    entry = status["blocks.1.up", "b"]
    assert (entry.kind, entry.r, entry.active, entry.merged, entry.trainable) == ("LoraLinear", 3, False, True, False)
    assert entry.scaling == pytest.approx(8 / 3)
    entry = status["blocks.0.down", "c"]
    assert (entry.active, entry.merged, entry.trainable, entry.scaling) == (True, False, True, 8.0)
    head = status["head", "a"]
    assert (head.kind, head.r, head.scaling, head.merged, head.trainable) == ("TrainedModule", None, None, False, False)
    assert adapter_status(Net()) == [] and adapter_names(Net()) == []


# --- adapters that meet in one module: neither may change the other ---------------------------------------------------


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapters." in path:
                parameter.normal_(std=0.3)
    return model


def computed(model: nn.Module, x: Tensor, *names: str) -> Tensor:
    return set_adapter(model, names)(x).detach()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


# One adapter trains a module in full that another one adapts, or has layers in.
MEETINGS = {
    "a layer": (Net, {"target_modules": ["down"]}, {"target_modules": ["up"], "modules_to_save": ["down"]}),
    "a block": (Net, {"target_modules": ["up"]}, {"target_modules": ["head"], "modules_to_save": ["blocks.0"]}),
    "out_proj": (
        Attention,
        {"target_modules": ["out_proj"]},
        {"target_modules": ["attn"], "modules_to_save": ["out_proj"]},
    ),
}


@pytest.mark.parametrize("whole_first", [False, True])
@pytest.mark.parametrize("where", MEETINGS)
def test_adapters_that_meet_in_one_module(where, whole_first, tmp_path):
    make, part, whole = MEETINGS[where]
    base, x = make().eval(), torch.randn(2, 3, 6) if make is Attention else torch.randn(3, 6)
    model = copy.deepcopy(base)
    for name, options in sorted({"part": part, "whole": whole}.items(), reverse=whole_first):
        inject(model, LoraConfig(r=2, **options), name)
        torch.testing.assert_close(model(x), base(x))
    randomized(model)
    for name in ("part", "whole"):
        expected = computed(model, x, name)
        assert not torch.allclose(expected, base(x))
        save_adapter(model, tmp_path / name, name)
        torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path / name)(x), expected)
        torch.testing.assert_close(merge_and_unload(copy.deepcopy(model))(x), expected)
    torch.testing.assert_close(computed(model, x), base(x))
    expected = computed(model, x, "part")
    torch.testing.assert_close(delete_adapter(model, "whole")(x), expected)
    plain = unload(model)
    torch.testing.assert_close(plain.state_dict(), base.state_dict(), rtol=0, atol=0)
    assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]


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


def test_a_lora_bias_is_merged_into_a_trained_bias_for_good():
    x, model = torch.randn(3, 6), Net().eval()
    inject(model, LoraConfig(r=2, target_modules=["up"], bias="all"), "a")
    inject(model, LoraConfig(r=2, target_modules=["up"], lora_bias=True), "b")
    randomized(model)
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
