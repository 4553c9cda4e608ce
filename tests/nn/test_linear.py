"""LoraAdapter and LoraLinear: state, errors, and equality with plain PyTorch."""

import pytest
import torch
from torch import nn

from lora_ext import functional
from lora_ext.nn import LoraAdapter, LoraLinear


@pytest.mark.cpu_only("cuBLAS may sum in another order when it accumulates")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_starts_with_the_bits_of_its_base_layer(dtype, bias):
    base = nn.Linear(384, 200, bias=bias, dtype=dtype)
    x = torch.randn(4, 33, 384).to(dtype)
    layer = LoraLinear(base, LoraAdapter(384, 200, 8, 16, dtype=torch.float32))
    assert torch.equal(layer(x), base(x))


def test_has_the_attributes_of_a_linear_layer():
    base = nn.Linear(24, 20)
    layer = LoraLinear(base, LoraAdapter(24, 20, 4, 8))
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (24, 20)
    assert "in_features=24, out_features=20, active=('default',)" in repr(layer) and "r=4" in repr(layer)


def test_frozen_weight_can_be_unfrozen():
    """An unfrozen weight gets the gradients of the linear layer."""
    layer = LoraLinear(nn.Linear(24, 20), LoraAdapter(24, 20, 4, 8, init_lora_weights=False))
    layer.base_layer.requires_grad_(True)
    x, grad_y = torch.randn(2, 3, 24), torch.randn(2, 3, 20)
    layer(x).backward(grad_y)
    torch.testing.assert_close(layer.weight.grad, grad_y.flatten(0, 1).T @ x.flatten(0, 1))
    torch.testing.assert_close(layer.bias.grad, grad_y.sum((0, 1)))


def test_names_of_adapters_and_updates():
    layer = LoraLinear(nn.Linear(6, 4), LoraAdapter(6, 4, 2, 4))
    with pytest.raises(ValueError, match=r"adapter 'default' exists; the adapters are \['default'\]"):
        layer.add_adapter("default", LoraAdapter(6, 4, 2, 2))
    with pytest.raises(KeyError, match=r"adapter 'default' has no update of 'bias', only of \['weight'\]"):
        layer.delta_weight("default", "bias")
    with pytest.raises(KeyError, match=r"LoraLinear: no adapter 'other'; the adapters are \['default'\]"):
        layer.delta_weight("other")


@pytest.mark.parametrize(
    ("dtype", "alphas", "rank"),
    [
        (torch.float32, (2, 5), 5),
        (torch.bfloat16, (2, 3), 5),
        (torch.bfloat16, (2, 5), 2),  # a ratio of scalings would round the factors
    ],
    ids=str,
)
def test_one_op_computes_all_adapters_that_can_be_joined(dtype, alphas, rank, monkeypatch):
    calls, fused = [], functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *arguments: calls.append(arguments) or fused(*arguments))
    layer = LoraLinear(nn.Linear(6, 5))
    for name, r, alpha in zip("ab", (2, 3), alphas, strict=True):
        layer.add_adapter(name, LoraAdapter(6, 5, r, alpha, dtype=dtype, init_lora_weights=False))
    layer.set_active("a", "b")
    if rank == 5:
        monkeypatch.setattr(functional, "plus_lora_delta", None)
    layer(torch.randn(4, 6))
    assert [tuple(call[3].shape) for call in calls] == [(rank, 6)]
