"""Fake (meta) and autograd registrations of lora_shrink and lora_expand, LoRA's two products as separate ops."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from lora_ext._ops import composite
from lora_ext._ops.checks import accumulation_dtype, explain_inference
from lora_ext._ops.flops import Shape
from lora_ext._ops.registration import (
    LIBRARY,
    any_requires_grad,
    below_autograd,
    bias_gradient,
    fake_gradients,
    has_tangent,
    op_named,
    register_backward,
    register_composite,
    register_op,
)


def _flops(rows: Shape, factor: Shape, products: int = 1) -> int:
    return 2 * products * prod(rows[:-1]) * prod(factor)


@register_op("lora_shrink", flops=lambda x, A, **_: _flops(x, A))
def _(x, lora_A):
    return x.new_empty((*x.shape[:-1], lora_A.shape[0]), dtype=accumulation_dtype(x.dtype))


@register_op("lora_expand", flops=lambda base, xa, B, *_, **__: _flops(base, B))
def _(base, xa, lora_B, bias):
    return base.new_empty(base.shape)


@register_op("lora_shrink_backward", flops=lambda grad_xa, x, A, base, wanted, **_: _flops(x, A, sum(wanted)))
def _(grad_xa, x, lora_A, base, output_mask):
    want_x, want_A = output_mask
    return x.new_empty(x.shape) if want_x else None, *(fake_gradients([lora_A]) if want_A else [None])


@register_op("lora_expand_backward", flops=lambda grad_y, xa, B, wanted, **_: _flops(grad_y, B, sum(wanted)))
def _(grad_y, xa, lora_B, output_mask):
    want_xa, want_B = output_mask
    shape = (*grad_y.shape[:-1], lora_B.shape[1])
    return (
        grad_y.new_empty(shape, dtype=accumulation_dtype(grad_y.dtype)) if want_xa else None,
        *(fake_gradients([lora_B]) if want_B else [None]),
    )


# --- autograd of each product, for traced graphs; bottleneck.py has one function for both ---


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_A):
        with below_autograd():
            xa = torch.ops.lora_ext.lora_shrink.default(x, lora_A)
        ctx.save_for_backward(x, lora_A)
        return xa

    @staticmethod
    def backward(ctx, grad_xa):
        return torch.ops.lora_ext.lora_shrink_backward.default(grad_xa, *ctx.saved_tensors, None, ctx.needs_input_grad)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, xa, lora_B, bias):
        with below_autograd():
            y = torch.ops.lora_ext.lora_expand.default(base, xa, lora_B, bias)
        ctx.save_for_backward(xa if ctx.needs_input_grad[2] else None, lora_B)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        want_base, want_xa, want_B, want_bias = ctx.needs_input_grad
        grads = torch.ops.lora_ext.lora_expand_backward.default(grad_y, *ctx.saved_tensors, (want_xa, want_B))
        return grad_y if want_base else None, *grads, bias_gradient(grad_y) if want_bias else None


def _register_autograd(name: str, function: type[torch.autograd.Function], plain: Callable) -> None:
    op = op_named(name)
    labels = [argument.name for argument in op._schema.arguments]
    plain = register_composite(name, plain)

    def kernel(*arguments):
        arguments += (None,) * (len(op._schema.arguments) - len(arguments))
        if has_tangent(*arguments):
            return plain(*arguments)
        if any_requires_grad(*arguments):
            try:
                return function.apply(*arguments)
            except RuntimeError as error:
                explain_inference(name, dict(zip(labels, arguments, strict=True)), error)
                raise
        with below_autograd():
            return op(*arguments)

    LIBRARY.impl(name, kernel, "Autograd")


_register_autograd("lora_shrink", _Shrink, composite.lora_shrink)
_register_autograd("lora_expand", _Expand, composite.lora_expand)
register_backward("lora_shrink_backward", composite.lora_shrink_backward)
register_backward("lora_expand_backward", composite.lora_expand_backward)
