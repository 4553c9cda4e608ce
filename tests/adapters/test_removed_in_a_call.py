"""Adapters that are deleted or renamed while rows of a running call use them: the call fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import llama, shaken, token_ids
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from lora_ext import LoraConfig, inject, set_adapter
from lora_ext.adapters import choose_adapters, delete_adapter, lora_modules, merge_and_unload, rename_adapter, unload

GONE = "adapter_names: 'b' was deleted or renamed during a call whose rows use it"
CHANGES = [
    lambda model: delete_adapter(model, "b"),
    lambda model: rename_adapter(model, "b", "other"),
    lambda model: inject(delete_adapter(model, "b"), LoraConfig(r=2, target_modules=["q_proj"]), "b"),
    unload,
    merge_and_unload,
]


def adapted() -> nn.Module:
    model = llama().eval()
    for name in "abc":
        inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), name)
    set_adapter(shaken(model), "a")
    return model


class During(StoppingCriteria):
    """Calls ``change`` after the second token, as another thread might."""

    def __init__(self, change: Callable[[nn.Module], Any], model: nn.Module) -> None:
        self.change, self.model, self.calls = change, model, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2:
            self.change(self.model)
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("change", CHANGES, ids=["delete", "rename", "replace", "unload", "merge_and_unload"])
def test_generate_fails(change):
    model = adapted()
    criteria = StoppingCriteriaList([During(change, model)])
    with pytest.raises(RuntimeError, match=GONE):
        model.generate(token_ids(), adapter_names=["b", "__base__"], max_new_tokens=5, stopping_criteria=criteria)


@pytest.mark.parametrize("change", CHANGES[:3], ids=["delete", "rename", "replace"])
def test_a_forward_fails(change):
    model = adapted()
    handle = model.model.layers[-1].register_forward_hook(lambda *_: change(model) and None)  # after the last adapter
    with pytest.raises(RuntimeError, match=GONE):
        model(token_ids(), adapter_names=["b", "a"])
    handle.remove()
    set_adapter(model, "a")
    with torch.no_grad():
        torch.testing.assert_close(
            *(model(x, **names).logits for x in [token_ids()] for names in ({}, {"adapter_names": ["a"] * 2}))
        )
    assert model._lora_adapters.active.row_calls == 0


def test_other_adapters_may_go():
    model, x = adapted(), token_ids()
    expected = model.generate(x, adapter_names=["b", "a"], max_new_tokens=5)
    criteria = StoppingCriteriaList([During(lambda model: delete_adapter(model, "c"), model)])
    assert torch.equal(
        model.generate(x, adapter_names=["b", "a"], max_new_tokens=5, stopping_criteria=criteria), expected
    )
    with choose_adapters(model, ["a", "a"]):
        rename_adapter(model, "b", "d")
        model(x)


def test_names_of_removed_adapters_are_not_kept():
    """A server that loads and deletes an adapter for each user must not grow."""
    model = adapted()
    (active,) = {layer.active for _, layer in lora_modules(model)}
    for i in range(3):
        inject(model, LoraConfig(r=2, target_modules=["q_proj"]), f"user-{i}")
        delete_adapter(set_adapter(model, "a"), f"user-{i}")
    assert {*active.additions} == {*"abc"} and active.removals == 3
    copied = copy.deepcopy(model)
    delete_adapter(copied, "b")
    (of_copy,) = {layer.active for _, layer in lora_modules(copied)}
    assert {*of_copy.additions} == {"a", "c"} and {*active.additions} == {*"abc"}
