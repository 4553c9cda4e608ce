"""PEFT's target_parameters on our kernels: stacked experts without a tensor of their size, equal to PEFT's own code."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.merging import same_bits
from support.mixtures import LargestTensor, mixture
from support.models import token_ids
from torch import nn

from lora_ext.integrations.peft import accelerate, report, restore

SETTINGS = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def pair(base: nn.Module) -> tuple[peft.PeftModel, peft.PeftModel]:
    """The same adapted model as PEFT runs it, and accelerated; with a second adapter that is not active."""
    config = peft.LoraConfig(**SETTINGS, target_parameters=EXPERTS)
    theirs = peft.get_peft_model(base, config)
    theirs.add_adapter("other", peft.LoraConfig(**SETTINGS | {"lora_alpha": -2}, target_parameters=EXPERTS))
    return theirs, accelerate(copy.deepcopy(theirs))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_states_and_memory(implementation):
    theirs, ours = pair(mixture("mixtral", implementation))
    ids = token_ids()[:1, :2]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        with LargestTensor() as largest:
            torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        assert largest.numel < 4 * 16 * 24
        with ours.disable_adapter(), theirs.disable_adapter():
            assert same_bits(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
            assert all("disabled" in layer.forward for layer in report(ours))
        ours.merge_adapter()
        torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        ours.unmerge_adapter()
        restore(ours)
        with LargestTensor() as largest:
            torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        assert largest.numel >= 4 * 16 * 24
        torch.testing.assert_close(ours.merge_and_unload()(input_ids=ids).logits, expected)


def test_a_module_that_reads_its_parameter_otherwise_runs_pefts_code():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x):
            return torch.einsum("nd,efd->nef", x, dict(self.named_parameters()).get("weight", self.weight))

    base = nn.ModuleDict({"experts": Reads()})
    theirs = peft.get_peft_model(base, peft.LoraConfig(**SETTINGS, target_parameters=["experts.weight"]))
    ours = accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 5)
    theirs, ours_experts = theirs.base_model.model["experts"], ours.base_model.model["experts"]
    torch.testing.assert_close(ours_experts(x), theirs(x))
