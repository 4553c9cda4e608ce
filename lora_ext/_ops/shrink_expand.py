"""lora_shrink and lora_expand, LoRA's two products as separate ops: autograd, fake kernels and registration.

Autograd of each product is for traced graphs; bottleneck.py has one function for both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_ext._load import op_named
from lora_ext._ops import plain
from lora_ext._ops.checks import accumulation_dtype, explain_inference
from lora_ext._ops.fast_path import below_autograd
from lora_ext._ops.linear import fake_gradients
from lora_ext._ops.registration import OPS, register, register_backward

_SHRINK, _EXPAND = op_named("lora_shrink"), op_named("lora_expand")


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_A):
        with below_autograd():
            xa = _SHRINK(x, lora_A)
        ctx.save_for_backward(x, lora_A)
        return xa

    @staticmethod
    def backward(ctx, grad_xa):
        return torch.ops.lora_ext.lora_shrink_backward.default(grad_xa, *ctx.saved_tensors, None, ctx.needs_input_grad)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, xa, lora_B, bias):
        with below_autograd():
            y = _EXPAND(base, xa, lora_B, bias)
        ctx.save_for_backward(xa if ctx.needs_input_grad[2] else None, lora_B)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        want_base, want_xa, want_B, want_bias = ctx.needs_input_grad
        grads = torch.ops.lora_ext.lora_expand_backward.default(grad_y, *ctx.saved_tensors, (want_xa, want_B))
        return grad_y if want_base else None, *grads, plain.bias_gradient(grad_y) if want_bias else None


def _record(name: str, function: type[torch.autograd.Function]) -> Callable:
    def record(*arguments):
        try:
            return function.apply(*arguments)
        except RuntimeError as error:
            explain_inference(name, OPS[name].by_name(*arguments), error)
            raise

    return record


def _fake_shrink(x, lora_A):
    return x.new_empty((*x.shape[:-1], lora_A.shape[0]), dtype=accumulation_dtype(x.dtype))


def _fake_expand(base, xa, lora_B, bias):
    return base.new_empty(base.shape)


def _fake_shrink_backward(grad_xa, x, lora_A, base, output_mask):
    want_x, want_A = output_mask
    return x.new_empty(x.shape) if want_x else None, *(fake_gradients([lora_A]) if want_A else [None])


def _fake_expand_backward(grad_y, xa, lora_B, output_mask):
    want_xa, want_B = output_mask
    shape = (*grad_y.shape[:-1], lora_B.shape[1])
    return (
        grad_y.new_empty(shape, dtype=accumulation_dtype(grad_y.dtype)) if want_xa else None,
        *(fake_gradients([lora_B]) if want_B else [None]),
    )


register("lora_shrink", _fake_shrink, plain=plain.lora_shrink, record=_record("lora_shrink", _Shrink))
register("lora_expand", _fake_expand, plain=plain.lora_expand, record=_record("lora_expand", _Expand))
register_backward("lora_shrink_backward", _fake_shrink_backward, plain.lora_shrink_backward)
register_backward("lora_expand_backward", _fake_expand_backward, plain.lora_expand_backward)
