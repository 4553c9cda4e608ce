"""Fake (meta), autograd and autocast registrations of the compiled ops. csrc/schemas.h has their schemas.

The autograd kernel sits on the Autograd dispatch key itself, not behind ``torch.library.register_autograd``: it costs
half as much per call, and goes straight below autograd where no gradient is wanted.
"""

from __future__ import annotations

import torch

from lora_ext._ops import checks, checks_backward, composite
from lora_ext._ops.registration import (
    LIBRARY,
    any_requires_grad,
    below_autograd,
    bias_gradient,
    fake_gradients,
    fake_saved,
    has_tangent,
    register_autocast,
    register_backward,
    register_composite,
    register_op,
    weight_gradient,
)

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
    """Under vmap with ``randomness="different"`` every sample has its own seed."""
    seeds = seed.movedim(in_dims[0], 0).unbind()
    return torch.stack([torch.ops.lora_ext.lora_dropout_mask.default(entry, *sizes) for entry in seeds]), 0


torch.library.register_vmap("lora_ext::lora_dropout_mask", _masks, lib=LIBRARY)

# --- autograd ---------------------------------------------------------------------------------------------------------


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
        with below_autograd():
            y, xa, mask = torch.ops.lora_ext.lora_linear.default(
                x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed
            )
        ctx.mark_non_differentiable(xa, mask)
        ctx.set_materialize_grads(False)
        want_x, want_weight, _, want_A, want_B = ctx.needs_input_grad[:5]
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
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y, xa, mask

    @staticmethod
    def backward(ctx, grad_y, _grad_xa, _grad_mask):
        if grad_y is None:
            return (None,) * 8
        x, weight, lora_A, lora_B, xa, mask = ctx.saved_tensors
        want_x, want_weight, want_bias, want_A, want_B = ctx.needs_input_grad[:5]
        if want_B and torch.is_grad_enabled():
            xa = composite.xa_to_differentiate(
                "lora_linear", xa, x, want_x, [lora_A], mask, [ctx.scaling], ctx.dropout_p
            )
        grad_x = grad_A = grad_B = grad_weight = grad_bias = None
        if want_x or want_A or want_B:
            grad_x, grad_A, grad_B = torch.ops.lora_ext.lora_linear_backward.default(
                grad_y, x, weight, lora_A, lora_B, xa, mask, ctx.scaling, ctx.dropout_p, (want_x, want_A, want_B)
            )
        # The weight and bias are frozen in LoRA; a user who unfreezes them gets the plain linear layer's gradients.
        if want_weight:
            grad_weight = weight_gradient(grad_y, x)
        if want_bias:
            grad_bias = bias_gradient(grad_y)
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None


def _lora_linear_autograd(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    if has_tangent(x, weight, bias, lora_A, lora_B):
        return _composite(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    if any_requires_grad(lora_A, lora_B, x, weight, bias):
        return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    with below_autograd():
        return torch.ops.lora_ext.lora_linear.default(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


_composite = register_composite("lora_linear", composite.lora_linear, num_cast=3)
LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd")
register_backward("lora_linear_backward", composite.lora_linear_backward)


# --- autocast: x, weight and bias go to autocast's dtype as in nn.Linear; the adapter keeps its own -------------------

register_autocast("lora_linear", num_cast=3)
