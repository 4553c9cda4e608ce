"""Tests which layers of Transformers' models are computed together, natively and under PEFT, with unchanged results."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.versions import needs
from torch import Tensor, nn

from architectures.compare import ALIVE, assert_near, output
from architectures.table import ARCHITECTURES
from lora_ext import LoraConfig, inject
from lora_ext.adapters import InputGroups, input_groups
from lora_ext.integrations.peft import accelerate, report

LAYERS = needs("transformers", "5.24", "the table has its names of layers")
pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), LAYERS]

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
QKV, GATES = "q_proj k_proj v_proj", "gate_proj up_proj"
# The groups of every block. GPT-NeoX packs q, k and v in one weight; its attention and its MLP have norms of their own.
GROUPS = {
    "Llama": {QKV, GATES},
    "Mistral": {QKV, GATES},
    "Qwen2": {QKV, GATES},
    "Qwen3": {QKV, GATES},
    "Gemma2": {QKV, GATES},
    "Gemma3": {QKV, GATES},
    "Phi": {QKV},
    "GPT-NeoX": set(),
    "BERT": {"query key value"},
    "RoBERTa": {"query key value"},
    "XLM-R": {"query key value"},
    "ViT": {QKV},
}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    y = output(model, inputs)
    y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"output": y.detach()} | grads


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, name)


def shared(groups: InputGroups) -> set[str]:
    """The last names of the layers of each group that is computed together."""
    return {" ".join(path.rpartition(".")[2] for path in paths) for paths in groups.together}


@pytest.mark.parametrize("name", GROUPS)
def test_native(name):
    base, inputs = BY_NAME[name].build(), BY_NAME[name].inputs()
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", **ALIVE)
    model, alone = inject(copy.deepcopy(base), config), inject(base, config, share_inputs=False)
    alone.load_state_dict(model.state_dict())
    assert not input_groups(alone)
    expected = step(alone, inputs)
    for _ in range(3):
        assert_same(step(model, inputs), expected)
    assert shared(input_groups(model)) == GROUPS[name]


@pytest.mark.parametrize("name", GROUPS)
def test_under_peft(name):
    base, inputs = BY_NAME[name].build(), BY_NAME[name].inputs()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", **ALIVE)).eval()
    ours = accelerate(copy.deepcopy(theirs))
    expected = step(theirs, inputs)
    for _ in range(3):
        assert_same(step(ours, inputs), expected)
    assert shared(report(ours).groups) == GROUPS[name]
    alone = accelerate(copy.deepcopy(theirs), share_inputs=False)
    assert_same(step(alone, inputs), expected)
    assert not report(alone).groups


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in GROUPS])
def test_every_other_architecture(name):
    architecture = BY_NAME[name]
    base, inputs = architecture.build(), architecture.inputs()
    config = LoraConfig(target_modules=architecture.targets.split(), **ALIVE)
    torch.manual_seed(0)
    model = inject(copy.deepcopy(base), config)
    alone = inject(base, config, share_inputs=False)
    alone.load_state_dict(model.state_dict())
    expected = step(alone, inputs)
    for _ in range(3):
        assert_same(step(model, inputs), expected)
