"""Subclasses of nn.Linear with a forward of their own: left out, refused, adapted as a parameter, or found out."""

from __future__ import annotations

import copy

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


def test_a_class_whose_output_is_known_to_take_no_update():
    base, x = nn.Sequential(nn.Linear(4, 4), DeepseekV4GroupedLinear()), torch.randn(2, 3, 4)
    for use_dora in (False, True):
        text = "1 (DeepseekV4GroupedLinear): its forward returns a part of the features"
        with refused(base, TypeError, text, "target_parameters"):
            inject(base, LoraConfig(target_modules=["0", "1"], use_dora=use_dora, **ALIVE))
    with pytest.warns(UserWarning, match=r"leaves out \['1.weight'\].*name them in"):
        model = inject(copy.deepcopy(base), LoraConfig(target_modules="all-linear", **ALIVE))
    assert [path for path, _ in lora_modules(model)] == ["0"]

    model = inject(copy.deepcopy(base), LoraConfig(target_modules=[], target_parameters=["1.weight"], **ALIVE))
    ((_, layer),) = lora_modules(model)
    updated = copy.deepcopy(base)
    with torch.no_grad():
        updated[1].weight += layer.delta_weight()
    torch.testing.assert_close(model(x), updated(x))
    torch.testing.assert_close(merge(model.eval())(x), updated(x))


class Wider(nn.Linear):
    """Appends features, as Idefics' output head does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x], -1)


class Counting(nn.Linear):
    """Keeps the last output, and takes inputs of three rows only."""

    last = None

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-2] == 3
        self.last = super().forward(x)
        return self.last


def test_other_classes_are_called_and_checked_then():
    x = torch.randn(2, 3, 4)
    model = inject(nn.Sequential(Wider(4, 6)), LoraConfig(target_modules=["0"], **ALIVE))
    with pytest.raises(ValueError, match="lora_delta_: lora_B has out_features=6 but y has 10"):
        model(x)
    base = Counting(4, 6)
    model = inject(nn.Sequential(base), LoraConfig(target_modules=["0"], **ALIVE))
    assert model[0].base_layer is base and base.last is None
    torch.testing.assert_close(model(x), base(x) + x @ model[0].delta_weight().T)
