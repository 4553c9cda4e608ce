"""lora_delta_: an adapter added in place to the output of any base layer. test_values.py has its arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layers import random_layer
from torch import Tensor, nn

from lora_ext import functional, reference

SEED = torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_adapter_leaves_every_bit(dtype):
    layer = random_layer((33, 64, 48, 8), (dtype, torch.float32))
    y = torch.randn(33, 48).to(dtype)
    before = y.clone()
    assert functional.lora_delta_(y, layer.x, layer.lora_A, torch.zeros_like(layer.lora_B), 2.0) is y
    assert torch.equal(y, before)


def test_a_negative_scaling_takes_out_again():
    layer = random_layer((33, 64, 48, 8), (torch.float64, torch.float64))
    y = torch.randn(33, 48, dtype=torch.float64)
    before = y.clone()
    for scaling in (0.5, -0.5):
        functional.lora_delta_(y, layer.x, layer.lora_A, layer.lora_B, scaling)
    torch.testing.assert_close(y, before)


# --- with base layers -------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, base: nn.Module, in_features: int, out_features: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.base, self.dropout_p = base, dropout_p
        self.lora_A = nn.Parameter(torch.randn(4, in_features))
        self.lora_B = nn.Parameter(torch.randn(out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        seed = SEED.to(x.device) if self.dropout_p else None
        return functional.lora_delta_(self.base(x), x, self.lora_A, self.lora_B, 0.5, self.dropout_p, seed)

    def plain(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + reference.lora_delta(x, self.lora_A, self.lora_B, 0.5, self.dropout_p, SEED)).to(y.dtype)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "base",
    [
        nn.Linear(24, 20),
        nn.Linear(24, 20, bias=False),
        nn.utils.parametrizations.weight_norm(nn.Linear(24, 20)),
        nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 20)),
    ],
    ids=["linear", "no bias", "weight norm", "bottleneck"],
)
def test_base_layers(base, frozen):
    module = Adapted(copy.deepcopy(base).requires_grad_(not frozen), 24, 20, dropout_p=0.3).double()
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)  # nn.Linear returns a view of three dimensions
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    y, expected = module(x), module.plain(x)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(value.square().sum(), leaves) for value in (y, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_beside_a_quantised_base(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="a GPU machine may not have it; make test does")
    options = dict(has_fp16_weights=False) if kind == "Linear8bitLt" else dict(compute_dtype=torch.float32)
    base = getattr(bitsandbytes.nn, kind)(64, 48, **options)
    base.load_state_dict(nn.Linear(64, 48).state_dict())
    base = base.to(torch.get_default_device()).requires_grad_(False)  # this quantises
    assert base.weight.dtype != torch.float32
    module = Adapted(base, 64, 48)
    x, grad_y = torch.randn(5, 64, requires_grad=True), torch.randn(5, 48) / 48**0.5
    y, expected = module(x), module.plain(x)
    torch.testing.assert_close(y, expected)
    leaves = [x, module.lora_A, module.lora_B]
    grads = [torch.autograd.grad(value, leaves, grad_y) for value in (y, expected)]
    torch.testing.assert_close(*grads)


def test_a_base_whose_backward_needs_its_output_is_caught():
    y = torch.randn(6, 20, requires_grad=True).exp()
    layer = random_layer((6, 24, 20, 4))
    functional.lora_delta_(y, layer.x, layer.lora_A, layer.lora_B, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_base_that_returns_its_input_is_refused(requires_grad):
    x = torch.randn(2, 6, 20)
    before = x.clone()
    A, B = torch.randn(4, 20, requires_grad=requires_grad), torch.randn(20, 4)
    for y in (x, x.view(12, 20).view(2, 6, 20)):
        with pytest.raises(
            ValueError, match="lora_delta_: y shares memory with x, which would change with it; pass a clone"
        ):
            functional.lora_delta_(y, x, A, B, 1.0)
    assert torch.equal(x, before)
    functional.lora_delta_(x[1], x[0], A.detach(), B, 1.0)  # neighbours
    torch.testing.assert_close(x[1], before[1] + reference.lora_delta(before[0], A.detach(), B, 1.0))
