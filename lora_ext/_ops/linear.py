"""Fake (meta), autograd and autocast registrations of lora_linear, its backward and lora_dropout_mask.

The autograd kernel sits on the Autograd dispatch key itself, not behind ``torch.library.register_autograd``: it costs
half as much per call, and goes straight below autograd where no gradient is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext._ops import checks, checks_backward, composite
from lora_ext._ops.registration import (
    LIBRARY,
    any_requires_grad,
    below_autograd,
    bias_gradient,
    call_backward,
    fake_gradients,
    fake_saved,
    has_tangent,
    op_named,
    register_autocast,
    register_backward,
    register_composite,
    register_op,
    weight_gradient,
)
from lora_ext._ops.usual_calls import is_usual_call, lean_apply

# --- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


@register_op("lora_linear", checks.check_lora_linear)
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), *fake_saved(x, lora_A.shape[0], dropout_p)


@register_op("lora_linear_backward", checks_backward.check_lora_linear_backward)
def _(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    want_x, want_A, want_B = output_mask
    return (
        grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if want_x else None,
        *(fake_gradients([lora_A]) if want_A else [None]),
        *(fake_gradients([lora_B]) if want_B else [None]),
    )


@register_op("lora_dropout_mask", checks.check_dropout_mask)
def _(seed, num_tokens, in_features, dropout_p):
    return seed.new_empty((num_tokens, checks.mask_row_bytes(in_features)), dtype=torch.uint8)


def _masks(info, in_dims, seed, *sizes):
    """Draws a mask for each seed: under vmap with ``randomness="different"`` every sample has one."""
    seeds = seed.movedim(in_dims[0], 0).unbind()
    return torch.stack([torch.ops.lora_ext.lora_dropout_mask.default(entry, *sizes) for entry in seeds]), 0


torch.library.register_vmap("lora_ext::lora_dropout_mask", _masks, lib=LIBRARY)

# --- autograd ---------------------------------------------------------------------------------------------------------


class _LoraLinear(torch.autograd.Function):
    """Returns only y: every result costs time, and functional.lora_linear needs no other.

    The other results of the op are appended to ``results``.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, results=None):
        with below_autograd():
            y, xa, mask = _op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        if results is not None:
            results += xa, mask
        ctx.set_materialize_grads(False)
        want_x, want_weight, _, want_A, want_B, *_ = ctx.needs_input_grad
        has_mask = mask.dim() == 2 and (want_x or want_A)
        # Keeps alive only what a wanted gradient reads. x is shared with its producer; dropout(x) never exists.
        ctx.save_for_backward(
            x if want_A or want_weight else None,
            weight,
            lora_A,
            lora_B,
            xa if want_B else None,
            mask if has_mask else None,
        )
        ctx.numbers = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return (None,) * 9
        x, weight, lora_A, lora_B, xa, mask = ctx.saved_tensors
        scaling, dropout_p = ctx.numbers
        want_x, want_weight, want_bias, want_A, want_B, *_ = ctx.needs_input_grad
        if want_B and torch.is_grad_enabled():
            xa = composite.xa_to_differentiate("lora_linear", xa, x, want_x, [lora_A], mask, [scaling], dropout_p)
        grad_x = grad_A = grad_B = grad_weight = grad_bias = None
        if want_x or want_A or want_B:
            grad_x, grad_A, grad_B = call_backward(
                _backward_op, grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, (want_x, want_A, want_B)
            )
        # The weight and bias are frozen in LoRA; a user who unfreezes them gets the plain linear layer's gradients.
        if want_weight:
            grad_weight = weight_gradient(grad_y, x)
        if want_bias:
            grad_bias = bias_gradient(grad_y)
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None, None


_op, _backward_op = op_named("lora_linear"), op_named("lora_linear_backward")
_lean_apply = lean_apply(_LoraLinear, num_tensors=5)


def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> Tensor:
    """Calls the op for y alone; a usual call skips the dispatcher's round through the autograd kernel below."""
    if not is_usual_call(x, weight, bias, lora_A, lora_B):
        return _op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
    if any_requires_grad(lora_A, lora_B, x, weight, bias):
        return _lean_apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, None)
    with below_autograd():
        return _op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]


def _lora_linear_autograd(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    if has_tangent(x, weight, bias, lora_A, lora_B):
        return _composite(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    if any_requires_grad(lora_A, lora_B, x, weight, bias):
        results: list = []
        y = _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, results)
        return y, *results
    with below_autograd():
        return _op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


_composite = register_composite("lora_linear", composite.lora_linear, num_cast=3)
LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd")
register_backward("lora_linear_backward", composite.lora_linear_backward)


# --- autocast: x, weight and bias go to autocast's dtype as in nn.Linear; the adapter keeps its own -------------------

register_autocast("lora_linear", num_cast=3)
