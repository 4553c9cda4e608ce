"""lora_delta_: an adapter added in place to the output of any base layer. test_values.py has its arithmetic."""

from __future__ import annotations

import pytest
import torch
from support.layers import random_layer

from lora_ext import functional, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_adapter_leaves_every_bit(dtype):
    layer = random_layer((33, 64, 48, 8), (dtype, torch.float32))
    y = torch.randn(33, 48).to(dtype)
    before = y.clone()
    assert functional.lora_delta_(y, layer.x, layer.lora_A, torch.zeros_like(layer.lora_B), 2.0) is y
    assert torch.equal(y, before)


# --- with base layers -------------------------------------------------------------------------------------------------


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
