"""functional.bottleneck: gradients of biases, residuals. Arithmetic: test_values.py."""

from __future__ import annotations

import pytest
import torch
from support import op_table

from lora_ext import functional
from lora_ext._ops.plain import bias_gradient


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_bias_gradients_of_many_tokens_in_another_dtype(dtypes):
    """The sum is computed in pieces of different sizes, and rounded only at the end."""
    grad_y = (torch.randn(3000, 97) + 0.3).to(dtypes[0])
    exact, ours = grad_y.double().sum(0), bias_gradient(grad_y, dtypes[1])
    assert ours.dtype == dtypes[1]
    rounding = 1e-6 if dtypes[1] == torch.float32 else 2**-8
    assert ((ours.double() - exact).abs() <= rounding * exact.abs() + 1e-4).all()


def test_bias_gradients_in_a_narrower_dtype():
    grad_y = torch.randn(30000, 8) + 0.3
    assert torch.equal(bias_gradient(grad_y, torch.bfloat16), grad_y.sum(0).bfloat16())


def test_the_residual_may_be_wider_than_x():
    """As under autocast: 16-bit x with a float32 residual, which keeps its bits."""
    call = op_table.bottleneck((torch.bfloat16, torch.float32), size=(33, 64, 64, 8), bias=False).call
    residual = torch.randn(33, 64)
    call |= {"residual": residual, "up_weight": torch.zeros_like(call["up_weight"])}
    assert torch.equal(functional.bottleneck(**call), residual)


def test_a_residual_of_another_shape_is_refused_also_with_as_many_tokens():
    call = op_table.bottleneck(size=(1, 24, 20, 4)).call
    with pytest.raises(ValueError, match=r"^bottleneck: residual has shape \[20\] but x has \[1, 24\]"):
        functional.bottleneck(**call | {"residual": call["residual"].reshape(20)})
