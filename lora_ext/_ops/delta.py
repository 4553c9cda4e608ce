"""Fake (meta), autograd and autocast registrations of lora_delta_, the adapter of a base layer of any kind."""

from __future__ import annotations

import torch

from lora_ext._ops import checks, checks_backward, composite
from lora_ext._ops.in_place import check_inference, check_recorded_change, check_saved, count_change
from lora_ext._ops.registration import (
    LIBRARY,
    any_requires_grad,
    below_autograd,
    call_backward,
    fake_gradients,
    fake_saved,
    has_tangent,
    op_named,
    register_autocast,
    register_backward,
    register_composite,
    register_op,
)

# --- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


@register_op("lora_delta_", checks.check_lora_delta)
def _(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    return fake_saved(x, lora_A.shape[0], dropout_p)


@register_op("lora_delta_backward", checks_backward.check_lora_delta_backward)
def _(grad_y, x, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    want_x, want_A, want_B = output_mask
    return (
        grad_y.new_empty((*grad_y.shape[:-1], lora_A.shape[1])) if want_x else None,
        *(fake_gradients([lora_A]) if want_A else [None]),
        *(fake_gradients([lora_B]) if want_B else [None]),
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


class _LoraDelta(torch.autograd.Function):
    """Returns only y: autograd lets no function with several results change a view, and nn.Linear returns a view.

    The results of the op are appended to ``results``.
    """

    @staticmethod
    def forward(ctx, y, x, lora_A, lora_B, scaling, dropout_p, seed, results):
        with below_autograd():  # mark_dirty counts the change
            xa, mask = torch.ops.lora_ext.lora_delta_.default(y, x, lora_A, lora_B, scaling, dropout_p, seed)
        results += xa, mask
        ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        _, want_x, want_A, want_B = ctx.needs_input_grad[:4]
        has_mask = mask.dim() == 2 and (want_x or want_A)
        # Keeps alive only what a wanted gradient reads. y is not read: any op may have produced it.
        ctx.save_for_backward(x if want_A else None, lora_A, lora_B, xa if want_B else None, mask if has_mask else None)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        want_y, want_x, want_A, want_B = ctx.needs_input_grad[:4]
        grad_x = grad_A = grad_B = None
        if grad_y is not None and (want_x or want_A or want_B):
            x, lora_A, lora_B, xa, mask = ctx.saved_tensors
            if want_B and torch.is_grad_enabled():
                xa = composite.xa_to_differentiate(
                    "lora_delta_", xa, x, want_x, [lora_A], mask, [ctx.scaling], ctx.dropout_p
                )
            grad_x, grad_A, grad_B = call_backward(
                _backward_op, grad_y, x, lora_A, lora_B, xa, mask, ctx.scaling, ctx.dropout_p, (want_x, want_A, want_B)
            )
        return grad_y if want_y else None, grad_x, grad_A, grad_B, None, None, None, None


def _lora_delta_autograd(y, x, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    if has_tangent(y, x, lora_A, lora_B):
        return _composite(y, x, lora_A, lora_B, scaling, dropout_p, seed)
    if any_requires_grad(y, x, lora_A, lora_B):
        check_recorded_change("lora_delta_", "y", y)
        check_saved("lora_delta_", "lora_A", lora_A)
        check_saved("lora_delta_", "lora_B", lora_B)
        if lora_A is not None and lora_A.requires_grad:
            check_saved("lora_delta_", "x", x)
        results: list = []
        _LoraDelta.apply(y, x, lora_A, lora_B, scaling, dropout_p, seed, results)
        return tuple(results)
    check_inference("lora_delta_", "y", y)
    with below_autograd():
        results = torch.ops.lora_ext.lora_delta_.default(y, x, lora_A, lora_B, scaling, dropout_p, seed)
    count_change(y)
    return results


# Not register_in_place(): in inference mode its kernel would cost as much as the op. functional.lora_delta_ does its
# work there.
_backward_op = op_named("lora_delta_backward")
_composite = register_composite("lora_delta_", composite.lora_delta_)
LIBRARY.impl("lora_delta_", _lora_delta_autograd, "Autograd")
register_backward("lora_delta_backward", composite.lora_delta_backward)
# y's dtype was settled by the base layer, and x has it or is cast to it by functional.lora_delta_.
register_autocast("lora_delta_", num_cast=0)
