"""Fake (meta), autograd and autocast registrations of lora_grouped_linear: a linear layer whose rows choose adapters.

Its kernel is for inference on the CPU. Where autograd records the call, it is a linear layer and lora_grouped_.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._ops import composite, flops
from lora_ext._ops.registration import (
    LIBRARY,
    any_requires_grad,
    below_autograd,
    checked_arguments,
    has_tangent,
    op_named,
    register_autocast,
    register_composite,
    register_op,
)
from lora_ext._ops.usual_calls import is_usual_call


def _flops(x, weight, bias, As, Bs, *_, **__) -> int:
    return flops.of_forward(x, [weight], [flops.largest_matrix(As)], [flops.largest_matrix(Bs)])


@register_op("lora_grouped_linear", flops=_flops)
def _(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def lora_grouped_linear(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks) -> Tensor | None:
    """Calls the op if it has a kernel: on the CPU, without gradients. None: it has none."""
    tensors = x, weight, *lora_As, *lora_Bs, group_of_row, scalings, bias, ranks
    if x.device.type != "cpu" or any_requires_grad(*tensors):
        return None
    if not is_usual_call(*tensors):
        return _op(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
    with below_autograd():
        return _op(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)


def _lora_grouped_linear_autograd(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks=None):
    tensors = x, weight, bias, *lora_As, *lora_Bs
    if has_tangent(*tensors):
        return _composite(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
    if any_requires_grad(*tensors, scalings):
        checked_arguments["lora_grouped_linear"](x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
        y = F.linear(x, weight, bias)
        torch.ops.lora_ext.lora_grouped_.default(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks)
        return y
    with below_autograd():
        return _op(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)


_op = op_named("lora_grouped_linear")
_composite = register_composite("lora_grouped_linear", composite.lora_grouped_linear, num_cast=3)
LIBRARY.impl("lora_grouped_linear", _lora_grouped_linear_autograd, "Autograd")
register_autocast("lora_grouped_linear", num_cast=3)  # as lora_linear: the adapters keep their dtype
