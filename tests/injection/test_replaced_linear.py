"""Parameters that are adapted while a library has put its function in the place of ``torch.nn.functional.linear``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import lora_modules

pytestmark = pytest.mark.cpu_only("the function that takes the place is written for the CPU")


class _Linear(torch.autograd.Function):
    """Computes ``x @ weight.T`` like the function that DeepSpeed puts in place of ``torch.nn.functional.linear``.

    Both arguments are saved for the backward, so both must be tensors.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


def _find_managed(module: nn.Module, inputs: tuple) -> None:
    """Stands for DeepSpeed's hook, which gathers the parameters of a module."""
    assert all(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))


@pytest.mark.parametrize("is_managed", [False, True])
def test_parameters_are_adapted_where_another_linear_function_wants_tensors(is_managed, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    inject(model, LoraConfig(r=2, target_parameters=["0.weight"], init_lora_weights=False))
    layer, x = next(layer for _, layer in lora_modules(model)), torch.randn(3, 6)
    expected = model(x)
    expected.square().sum().backward()
    want = [p.grad.clone() for p in layer.adapters.parameters()]
    model.zero_grad()

    weight = layer.module.weight
    if is_managed:
        weight.ds_id = 0  # its values are in place, as in a call
        layer.module.register_forward_pre_hook(_find_managed)
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: _Linear.apply(x, weight))
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([p.grad for p in layer.adapters.parameters()], want)
    assert layer.module.weight is weight
