"""Subclasses of nn.Linear whose output is not ``[..., out_features]``: refused, or adapted as a parameter."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, merge
from lora_ext.adapters import lora_modules

ALIVE = {"r": 2, "init_lora_weights": False}


class DeepseekV4GroupedLinear(nn.Linear):
    """Each group of the input has its own rows of the weight, as in DeepSeek V4's output projection."""

    def __init__(self) -> None:
        super().__init__(4, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, 3, 4).transpose(0, 1)
        return torch.bmm(groups, self.weight.view(3, 2, 4).mT).transpose(0, 1).reshape(*x.shape[:-2], 3, -1)


class Wider(nn.Linear):
    """Appends features that another layer computes, as in Idefics' output head."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.more = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.more(x)], -1)


def test_a_known_class_is_left_out_refused_or_adapted_as_a_parameter():
    base, x = nn.Sequential(nn.Linear(4, 4), DeepseekV4GroupedLinear()), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="must match the size"):
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear", **ALIVE))(x)
    for use_dora in (False, True):
        with refused(base, TypeError, "1 (DeepseekV4GroupedLinear): its forward returns a part", "target_parameters"):
            inject(base, LoraConfig(target_modules=["0", "1"], use_dora=use_dora, **ALIVE))
    with pytest.warns(UserWarning, match=r"leaves out \['1.weight'\].*name them in target_parameters"):
        model = inject(copy.deepcopy(base), LoraConfig(target_modules="all-linear", **ALIVE))
    assert [path for path, _ in lora_modules(model)] == ["0"]

    model = inject(copy.deepcopy(base), LoraConfig(target_modules=[], target_parameters=["1.weight"], **ALIVE))
    ((_, layer),) = lora_modules(model)
    updated = copy.deepcopy(base)
    with torch.no_grad():
        updated[1].weight += layer.delta_weight()
    torch.testing.assert_close(model(x), updated(x))
    torch.testing.assert_close(merge(model.eval())(x), updated(x))


def test_another_class_fails_in_its_first_forward():
    model = inject(nn.Sequential(Wider()), LoraConfig(target_modules=["0"], **ALIVE))
    with pytest.raises(ValueError, match="lora_delta_: lora_B has out_features=6 but y has 8"):
        model(torch.randn(2, 3, 4))
