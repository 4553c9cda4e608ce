"""Subclasses of nn.Linear with a forward of their own: left out, refused, adapted as a parameter."""

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


class Grouped(nn.Linear):
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


@pytest.mark.parametrize("kind", [Grouped, Wider])
def test_output_of_another_size(kind):
    base = nn.Sequential(nn.Linear(4, 4), kind())
    x = torch.randn(2, 3, 4)
    if kind is Grouped:
        with pytest.raises(RuntimeError, match="must match the size"):
            peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear", **ALIVE))(x)
    for use_dora in (False, True):
        with refused(base, TypeError, f"1 ({kind.__name__}): its forward returns a tensor", "target_parameters"):
            inject(base, LoraConfig(target_modules=["0", "1"], use_dora=use_dora, **ALIVE))
    with pytest.warns(UserWarning, match=r"leaves out \['1.weight'\].*name them in target_parameters"):
        model = inject(copy.deepcopy(base), LoraConfig(target_modules="all-linear", **ALIVE))
    assert {path for path, _ in lora_modules(model)} == {"0"} | ({"1.more"} if kind is Wider else set())

    model = inject(copy.deepcopy(base), LoraConfig(target_modules=[], target_parameters=["1.weight"], **ALIVE))
    ((_, layer),) = lora_modules(model)
    updated = copy.deepcopy(base)
    with torch.no_grad():
        updated[1].weight += layer.delta_weight()
    torch.testing.assert_close(model(x), updated(x))
    torch.testing.assert_close(merge(model.eval())(x), updated(x))
    updated = copy.deepcopy(base)
    with torch.no_grad():
        updated[1].weight += layer.delta_weight()
    torch.testing.assert_close(model(x), updated(x))


class Counting(nn.Linear):
    """Keeps the last output, counts its calls, and takes inputs of three rows only."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.last = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = super().forward(x)
        assert x.shape[-2] == 3
        return self.last


def test_a_forward_that_cannot_be_tried_is_adapted_and_keeps_no_trace():
    base = Counting()
    model, x = inject(nn.Sequential(base), LoraConfig(target_modules=["0"], **ALIVE)), torch.randn(2, 3, 4)
    assert model[0].base_layer is base and base.last is None and base.calls == 0
    torch.testing.assert_close(model(x), base(x) + x @ model[0].delta_weight().T)
