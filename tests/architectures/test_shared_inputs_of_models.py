"""Tests which layers of Transformers' models are computed together, natively and under PEFT, with unchanged results."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from contracts.compare import ALIVE, assert_all_near, output
from support.versions import needs
from torch import Tensor, nn

from architectures.table import ARCHITECTURES, SIMILAR
from lora_ext import LoraConfig, inject
from lora_ext.adapters import input_groups
from lora_ext.integrations.peft import accelerate, report

LAYERS = needs("transformers", "5.24", "the table has its names of layers")
pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), LAYERS]

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
BOTH = {"q_proj k_proj v_proj", "gate_proj up_proj"}
# The groups of every block. GPT-NeoX packs q, k and v in one weight; its attention and its MLP have norms of their own.
GROUPS = dict.fromkeys(["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3"], BOTH)
GROUPS |= {name: {"query key value"} for name in ("BERT", "RoBERTa", "XLM-R")}
GROUPS |= {"Phi": {"q_proj k_proj v_proj"}, "ViT": {"q_proj k_proj v_proj"}, "GPT-NeoX": set()}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    y = output(model, inputs)
    y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"output": y.detach()} | grads


def injected(base: nn.Module, targets: str | list[str]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model whose layers share inputs, one whose layers do not, and the second again."""
    config = LoraConfig(target_modules=targets, **ALIVE)
    model, alone = inject(copy.deepcopy(base), config), inject(base, config, share_inputs=False)
    alone.load_state_dict(model.state_dict())
    return model, alone, alone


def accelerated(base: nn.Module, targets: str | list[str]) -> tuple[nn.Module, nn.Module, nn.Module]:
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, **ALIVE)).eval()
    return accelerate(copy.deepcopy(theirs)), accelerate(copy.deepcopy(theirs), share_inputs=False), theirs


CASES = [(name, adapt) for name in GROUPS for adapt in (injected, accelerated)]
CASES += [
    pytest.param(name, injected, marks=pytest.mark.slow if name in SIMILAR else pytest.mark.full)
    for name in BY_NAME
    if name not in GROUPS
]


@pytest.mark.parametrize(("name", "adapt"), CASES)
def test_layers_that_share_inputs(name, adapt):
    row = BY_NAME[name]
    inputs = row.inputs()
    torch.manual_seed(0)
    model, alone, plain = adapt(row.build(), "all-linear" if name in GROUPS else row.targets.split())
    expected = step(plain, inputs)
    for one in (model, model, model, alone):
        assert_all_near(step(one, inputs), expected)
    groups, of_alone = (input_groups(one) if adapt is injected else report(one).groups for one in (model, alone))
    assert not of_alone
    if name in GROUPS:
        assert {" ".join(path.rpartition(".")[2] for path in paths) for paths in groups.together} == GROUPS[name]
