"""LoraConv: what only convolutions do: sizes, calls without a batch, updates that cannot be merged."""

from __future__ import annotations

import pytest
import torch
from support.small_nets import CONVOLUTIONS, ConvNet, input_of
from torch import nn

from lora_ext import LoraConfig, inject, merge, unmerge

ALIVE = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}


def adapted(name: str, **settings) -> nn.Module:
    return inject(ConvNet(name).double(), LoraConfig(**{"target_modules": ["conv", "head"]} | ALIVE | settings))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_without_a_batch(name):
    layer, x = adapted(name).conv, input_of(name).requires_grad_()
    y, one = layer(x), layer(x[0])
    assert y.stride() == layer.base_layer(x).stride()
    torch.testing.assert_close(one, y[0])
    with torch.no_grad():
        torch.testing.assert_close([layer(x), layer(x[0])], [y, one])
    torch.testing.assert_close(torch.autograd.grad(one.sum(), x), torch.autograd.grad(y[0].sum(), x))


def test_rows_that_choose_need_a_batch():
    model, x = adapted("2d").eval(), input_of("2d")
    with pytest.raises(ValueError, match=r"adapter_names needs a batch, but the layer's input is \[6, 9, 10\]"):
        model(x[0], adapter_names=["default"] * 6)


def test_a_layer_whose_memory_format_changed_is_not_unmerged():
    model = merge(adapted("2d")).eval()
    model.to(memory_format=torch.channels_last)
    weight = model.conv.weight.clone()
    with pytest.raises(RuntimeError, match="the weight of 'conv' was converted to another memory format while merged"):
        unmerge(model)
    assert torch.equal(model.conv.weight, weight)
