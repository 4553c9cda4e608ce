"""Tests which models take ``adapter_names``: injected ones and their copies; others refuse it, despite ``**kwargs``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.models import refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import unload


class Swallows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.linear(x)


def injected(model: nn.Module) -> nn.Module:
    return inject(model, LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)).eval()


ROWS = {"adapter_names": ["default", "__base__"]}


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_model_and_its_copies_take_it(how):
    model, x = injected(Swallows()), torch.randn(2, 4)
    other = how(model)
    torch.testing.assert_close(other(x, **ROWS), torch.stack([model(x)[0], model.linear.base_layer(x)[1]]))
    assert torch.equal(other(x, adapter_names=None, anything=1), model(x))


def test_a_compiled_model_refuses_it():
    model, x = injected(Swallows()), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    with refused(model, ValueError, "adapter_names: a compiled model", "compiled._orig_mod"):
        compiled(x, **ROWS)
    assert torch.equal(compiled(x, adapter_names=None, anything=1), model(x))


def test_a_second_adapter_adds_no_second_hook():
    model = injected(Swallows())
    inject(model, LoraConfig(r=2, target_modules=["linear"]), "b")
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert not unload(model)._forward_pre_hooks and not model._forward_hooks


def test_it_breaks_no_graph():
    model, x = injected(Swallows()), torch.randn(2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, adapter_names=None), model(x))
