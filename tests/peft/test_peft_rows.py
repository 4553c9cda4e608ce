"""PEFT's mixed batches (``adapter_names``) on our ops: PEFT's numbers, and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from support.groups import watch_calls
from support.models import logits, token_ids
from support.peft_pairs import assert_same_step, config, model_pair, pair
from torch import nn

from lora_ext.integrations.peft import accelerate, restore

NAMES = ["1", "default", "__base__", "2", "1"]


@pytest.fixture
def rows_added(monkeypatch) -> list[int]:
    """The numbers of adapters that the calls of the op had."""
    calls: list[int] = []
    watch_calls(monkeypatch, lambda call: calls.append(len(call["lora_As"])))
    return calls


def model_with_adapters(name: str, **options) -> tuple[nn.Module, nn.Module]:
    theirs, ours = model_pair(name, **options)
    first = theirs.peft_config["default"]
    for model in (theirs, ours):
        torch.manual_seed(3)
        more = {"target_modules": first.target_modules, "fan_in_fan_out": first.fan_in_fan_out} | options
        model.add_adapter("1", config(**more | {"r": 7, "lora_alpha": 3}))
        model.add_adapter("2", config(**more | {"r": 2, "target_modules": sorted(first.target_modules)[:1]}))
        model.eval()
    return theirs, accelerate(ours)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3, "lora_bias": True}], ids=str)
def test_the_same_numbers(name, options, rows_added):
    theirs, ours = model_with_adapters(name, **options)
    ids = token_ids(5)
    assert_same_step(theirs, ours, lambda model: model(input_ids=ids, adapter_names=NAMES).logits)
    assert rows_added and set(rows_added) <= {2, 3}  # one call for each layer
    torch.testing.assert_close(logits(restore(ours), ids), logits(theirs, ids))


def mlp_pair(**options) -> tuple[nn.Module, nn.Module]:
    configs = [config(target_modules=["0", "2"], **options, r=r) for r in (4, 3, 2)]
    return pair(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)), *configs)


def test_variants_and_disabled_adapters_stay_pefts():
    theirs, ours = mlp_pair()
    x = torch.randn(5, 12)
    for model in (theirs, ours):
        model.add_adapter("dora", config(target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        copy.deepcopy(ours)(x, adapter_names=["dora"] * 5)  # PEFT leaves its hooks behind
    torch.testing.assert_close(ours(x, adapter_names=NAMES), theirs(x, adapter_names=NAMES))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x, adapter_names=NAMES), theirs(x, adapter_names=NAMES))


def test_pefts_refusals():
    _, ours = mlp_pair()
    x = torch.randn(5, 12)
    with pytest.raises(ValueError, match="Trying to infer with non-existing adapter"):
        ours(x, adapter_names=["x"] * 5)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        ours(x, adapter_names=NAMES[1:])
    ours.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        ours(x, adapter_names=NAMES)
    ours.eval().merge_adapter(["1"])
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        ours(x, adapter_names=NAMES)
    ours.unmerge_adapter()
    assert ours(x, adapter_names=NAMES).isfinite().all()
