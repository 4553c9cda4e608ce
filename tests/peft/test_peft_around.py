"""PEFT's adapters around a model with ours, and the reverse."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import gpt2, llama, logits, refused, token_ids
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import disable_adapters, merge, unmerge
from lora_ext.nn import AdapterLayer
from lora_ext.nn.adapter_layer import innermost

ALIVE = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
MODELS = {"llama": (llama, ["q_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "c_fc"])}


def trained_by_peft(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        path.removeprefix("base_model.model.").replace(".base_layer.lora_", ".lora_"): p
        for path, p in model.named_parameters()
        if ".lora_A.default" in path or ".lora_B.default" in path
    }


@pytest.fixture(params=MODELS)
def models(request) -> tuple[nn.Module, peft.PeftModel]:
    """PEFT on top of ours, and two adapters of PEFT with the same values."""
    make, targets = MODELS[request.param]
    base = make().eval()
    ours = inject(copy.deepcopy(base), LoraConfig(target_modules=targets, **ALIVE))
    expected = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, **ALIVE), "inner")
    expected.add_adapter("default", peft.LoraConfig(target_modules=targets, **ALIVE))
    expected.base_model.set_adapter(["inner", "default"])
    theirs = peft.get_peft_model(ours, peft.LoraConfig(target_modules=["base_layer"], **ALIVE))
    values = trained_by_peft(expected)
    assert trained_by_peft(theirs).keys() == values.keys()
    with torch.no_grad():
        for path, parameter in trained_by_peft(theirs).items():
            parameter.copy_(values[path])
        for path, module in expected.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                adapter = ours.get_submodule(path.removeprefix("base_model.model.")).adapters.default
                module.lora_A["inner"].weight.copy_(adapter.lora_A)
                module.lora_B["inner"].weight.copy_(adapter.lora_B)
    return theirs, expected


def test_peft_on_top(models):
    theirs, expected = models
    ids = token_ids()
    torch.testing.assert_close(logits(theirs, ids), logits(expected, ids))
    for model in (theirs, expected):
        logits(model, ids).square().sum().backward()
    for path, parameter in trained_by_peft(expected).items():
        torch.testing.assert_close(trained_by_peft(theirs)[path].grad, parameter.grad)
    expected.base_model.set_adapter("inner")
    with theirs.disable_adapter():
        torch.testing.assert_close(logits(theirs, ids), logits(expected, ids))


def test_peft_merges_and_unloads_its_own(models):
    theirs, expected = models
    ids = token_ids()
    want = logits(expected, ids)
    with refused(theirs, ValueError, "base_layer is a peft.tuners.lora.layer.Linear; merge or unload it first"):
        merge(theirs.base_model.model)
    theirs.merge_adapter()
    torch.testing.assert_close(logits(theirs, ids), want)
    theirs.unmerge_adapter()
    ours = theirs.merge_and_unload()
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in ours.modules())
    torch.testing.assert_close(logits(ours, ids), want)
    merge(ours)
    torch.testing.assert_close(logits(ours, ids), want)
    unmerge(ours)
    torch.testing.assert_close(logits(ours, ids), want)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.tokens(ids).mT).mT)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["tokens"]},
        {"target_modules": ["conv"]},
        {"target_modules": ["head"]},
        {"target_modules": ["conv"], "trainable_token_indices": {"tokens": [3, 5]}},
        {"target_modules": ["conv"], "trainable_token_indices": {"head": [1, 2]}},
    ],
)
def test_peft_on_top_of_other_kinds(settings):
    """Each update alone, and both: the layer is linear in its updates."""
    ids = torch.randint(9, (3, 7))
    ours = inject(Layers().eval(), LoraConfig(**settings, **ALIVE))
    for path, parameter in ours.named_parameters():
        if path.endswith(".rows"):
            nn.init.normal_(parameter)
    target = next(path for path, layer in ours.named_modules() if isinstance(layer, AdapterLayer))
    layer = ours.get_submodule(target)
    x = {"tokens": ids, "conv": torch.randn(2, 4, 7), "head": torch.randn(2, 6)}[target]
    wrapped = next(path for path, module in ours.named_modules() if module is innermost(layer))
    theirs = peft.get_peft_model(ours, peft.LoraConfig(target_modules=[wrapped], **ALIVE))
    with torch.no_grad():
        both = layer(x)
        with theirs.disable_adapter():
            only_ours = layer(x)
        with disable_adapters(ours):
            only_theirs = layer(x)
            with theirs.disable_adapter():
                base = layer(x)
    found = settings.get("trainable_token_indices", {}).get("tokens")
    if found:  # trained rows replace rows, PEFT's update included
        trained = torch.isin(ids, torch.tensor(found)).unsqueeze(-1)
        expected = torch.where(trained, only_ours, only_theirs)
    else:
        expected = only_ours + only_theirs - base
    assert not torch.allclose(only_theirs, base) and not torch.allclose(only_ours, base)
    torch.testing.assert_close(both, expected)


def test_each_library_saves_its_own_adapter(models, tmp_path):
    theirs, _ = models
    theirs.save_pretrained(tmp_path / "peft")
    save_adapter(theirs.base_model.model, tmp_path / "ours")
    saved = [
        peft.utils.load_peft_weights(str(tmp_path / directory), device="cpu").keys() for directory in ("peft", "ours")
    ]
    assert {key.replace(".base_layer.", ".") for key in saved[0]} == saved[1]
    assert all(".base_layer." in key for key in saved[0])


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", ["lora_A"], ["o_proj"]])
def test_peft_below_is_refused(targets):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    text = "inject: 'base_model.model.model.layers.0.self_attn.q_proj' is a layer of PEFT (Linear); merge or remove"
    with refused(model, ValueError, text, "merge_and_unload()", "target_modules=['base_layer']"):
        inject(model, LoraConfig(target_modules=targets))
    inject(model.merge_and_unload(), LoraConfig(target_modules=["q_proj"]))


def test_modules_that_peft_trains_are_refused():
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    part = model.base_model.model
    part.model = nn.Identity()
    with refused(part, ValueError, "inject: 'lm_head' is a layer of PEFT (ModulesToSaveWrapper)"):
        inject(part, LoraConfig(target_modules=["original_module"]))


def test_save_pretrained_is_refused_where_transformers_would_save_another_adapter(tmp_path, monkeypatch):
    """Transformers' add_adapter makes save_pretrained write PEFT's adapter under the names of ours."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # it wants PEFT 0.22
    base = llama()
    model = inject(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], **ALIVE))
    model.add_adapter(peft.LoraConfig(target_modules=["base_layer"], **ALIVE), "added")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.save_pretrained: PEFT's adapters were added.*save_adapter"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_adapter(model, tmp_path / "saved")
    again = load_adapter(base, tmp_path / "saved").eval()
    ids = token_ids()
    model.delete_adapter("added")
    torch.testing.assert_close(logits(again, ids), logits(model.eval(), ids))
