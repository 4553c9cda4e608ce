"""Tests which layers of Transformers' models are computed together, natively and under PEFT.

test_architectures.py has their results.
"""

from __future__ import annotations

import peft
import pytest
from contracts.compare import ALIVE
from support.versions import needs
from torch import nn

from architectures.table import ARCHITECTURES
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


def injected(base: nn.Module, **options: bool) -> nn.Module:
    return inject(base, LoraConfig(target_modules="all-linear", **ALIVE), **options)


def accelerated(base: nn.Module, **options: bool) -> nn.Module:
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", **ALIVE))
    return accelerate(model.eval(), **options)


@pytest.mark.parametrize("adapt", [injected, accelerated])
@pytest.mark.parametrize("name", GROUPS)
def test_layers_that_share_inputs(name, adapt):
    row = BY_NAME[name]
    for share_inputs in (True, False):
        model = adapt(row.build(), share_inputs=share_inputs)
        for _ in range(2):
            model(**row.inputs())
        groups = input_groups(model) if adapt is injected else report(model).groups
        found = {" ".join(path.rpartition(".")[2] for path in paths) for paths in groups.together}
        assert found == GROUPS[name] if share_inputs else not groups
