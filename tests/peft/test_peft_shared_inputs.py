"""PEFT's layers that read one tensor are computed together; what cannot be falls back to one op for each layer."""

from __future__ import annotations

import pytest
from support.models import llama, logits, token_ids
from support.peft_pairs import assert_same_step, config, pair
from torch import nn

from lora_ext.integrations.peft import report, restore

OPTIONS = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
IDS = token_ids()


def assert_same(theirs: nn.Module, ours: nn.Module) -> None:
    for _ in range(2):  # the groups are found in the first
        assert_same_step(theirs, ours, lambda model: logits(model, IDS))


def groups(model: nn.Module) -> set[str]:
    """The first letters of the layers of each group that is computed together."""
    return {"".join(path.rpartition(".")[2][0] for path in paths) for paths in report(model).groups.together}


def test_three_layers_are_one_group():
    theirs, ours = pair(llama(), config(**OPTIONS))
    assert_same(theirs, ours)
    assert groups(ours) == {"qkv"}
    assert "shared inputs: 6 layers in 2 groups are computed together" in str(report(ours))
    assert not report(restore(ours)).groups


def negate(model: nn.Module) -> None:
    for block in model.get_base_model().model.layers:
        block.self_attn.k_proj.scaling["default"] *= -1


def hook(model: nn.Module) -> None:
    for block in model.get_base_model().model.layers:
        block.self_attn.k_proj.base_layer.register_forward_hook(lambda _, inputs, y: y * 2)


@pytest.mark.parametrize(
    ("options", "change"),
    [({"lora_bias": True}, None), ({}, negate), ({}, hook)],
    ids=["lora_bias", "negative scaling", "hook on a base layer"],
)
def test_layers_that_fall_back(options, change):
    theirs, ours = pair(llama(), config(**OPTIONS | options))
    for model in (theirs, ours) if change else ():
        change(model)
    assert_same(theirs, ours)
    assert groups(ours) == (set() if change is None else {"qv"})
