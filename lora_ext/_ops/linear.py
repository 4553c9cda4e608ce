"""Fake (meta), autograd and autocast registrations of lora_linear, lora_delta_, their backward and lora_dropout_mask.

The autograd kernels sit on the Autograd dispatch key itself, not behind ``torch.library.register_autograd``: that costs
half as much per call, and goes straight below autograd where no gradient is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext._ops import checks, composite, flops
from lora_ext._ops.in_place import check_inference, check_recorded_change, check_saved, count_change
from lora_ext._ops.registration import (
    LIBRARY,
    any_requires_grad,
    below_autograd,
    bias_gradient,
    call_backward,
    fake_layer_gradients,
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


@register_op("lora_linear", flops=lambda x, W, bias, A, B, *_, **__: flops.of_forward(x, [W], [A], [B]))
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), *fake_saved(x, lora_A.shape[0], dropout_p)


@register_op("lora_delta_", flops=lambda y, x, A, B, *_, **__: flops.of_forward(x, [None], [A], [B]))
def _(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    return fake_saved(x, lora_A.shape[0], dropout_p)


def _backward_flops(grad_y, x, W, A, B, xa, mask, scaling, dropout_p, wanted, **_) -> int:
    return flops.of_backward(grad_y, [W], [A], [B], wanted)


@register_op("lora_linear_backward", flops=_backward_flops)
def _(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    grad_x, *factors = fake_layer_gradients(grad_y, [lora_A], [lora_B], output_mask)
    return grad_x, *(grads[0] if grads else None for grads in factors)


@register_op("lora_dropout_mask", flops=lambda *_, **__: 0)
def _(seed, num_tokens, in_features, dropout_p):
    return seed.new_empty((num_tokens, checks.mask_row_bytes(in_features)), dtype=torch.uint8)


def _masks(info, in_dims, seed, *sizes):
    """Draws a mask for each seed: under vmap with ``randomness="different"`` every sample has one."""
    seeds = seed.movedim(in_dims[0], 0).unbind()
    return torch.stack([torch.ops.lora_ext.lora_dropout_mask.default(entry, *sizes) for entry in seeds]), 0


torch.library.register_vmap("lora_ext::lora_dropout_mask", _masks, lib=LIBRARY)

# --- autograd ---------------------------------------------------------------------------------------------------------

_linear_op, _delta_op = op_named("lora_linear"), op_named("lora_delta_")
_backward_op = op_named("lora_linear_backward")


def _save(ctx, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, wanted: tuple[bool, bool, bool, bool]) -> None:
    """Keeps alive only what a wanted gradient reads. x is shared with its producer; dropout(x) never exists."""
    want_x, want_weight, want_A, want_B = wanted
    ctx.set_materialize_grads(False)
    has_mask = mask.dim() == 2 and (want_x or want_A)
    ctx.save_for_backward(
        x if want_A or want_weight else None, weight, lora_A, lora_B, xa if want_B else None, mask if has_mask else None
    )
    ctx.numbers = scaling, dropout_p


def _gradients(ctx, op: str, grad_y: Tensor, want_x: bool, want_A: bool, want_B: bool) -> tuple:
    """Returns the gradients of x, lora_A and lora_B."""
    x, weight, lora_A, lora_B, xa, mask = ctx.saved_tensors
    scaling, dropout_p = ctx.numbers
    if want_B and torch.is_grad_enabled():
        xa = composite.xa_to_differentiate(op, xa, x, want_x, [lora_A], mask, [scaling], dropout_p)
    return call_backward(
        _backward_op, grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, (want_x, want_A, want_B)
    )


class _LoraLinear(torch.autograd.Function):
    """Returns only y: every result costs time, and functional.lora_linear needs no other.

    The other results of the op are appended to ``results``.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, results=None):
        with below_autograd():
            y, xa, mask = _linear_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        if results is not None:
            results += xa, mask
        want_x, want_weight, _, want_A, want_B, *_ = ctx.needs_input_grad
        _save(ctx, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, (want_x, want_weight, want_A, want_B))
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return (None,) * 9
        want_x, want_weight, want_bias, want_A, want_B, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if want_x or want_A or want_B:
            grad_x, grad_A, grad_B = _gradients(ctx, "lora_linear", grad_y, want_x, want_A, want_B)
        # The weight and bias are frozen in LoRA; a user who unfreezes them gets the plain linear layer's gradients.
        grad_weight = weight_gradient(grad_y, ctx.saved_tensors[0]) if want_weight else None
        grad_bias = bias_gradient(grad_y) if want_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None, None


_lean_apply = lean_apply(_LoraLinear, num_tensors=5)


def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> Tensor:
    """Calls the op for y alone; a usual call skips the dispatcher's round through the autograd kernel below."""
    if not is_usual_call(x, weight, bias, lora_A, lora_B):
        return _linear_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
    if any_requires_grad(lora_A, lora_B, x, weight, bias):
        return _lean_apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, None)
    with below_autograd():
        return _linear_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]


def _lora_linear_autograd(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    if has_tangent(x, weight, bias, lora_A, lora_B):
        return _linear_composite(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    if any_requires_grad(lora_A, lora_B, x, weight, bias):
        results: list = []
        y = _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, results)
        return y, *results
    with below_autograd():
        return _linear_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


class _LoraDelta(torch.autograd.Function):
    """Returns only y: autograd lets no function with several results change a view, and nn.Linear returns a view.

    The results of the op are appended to ``results``.
    """

    @staticmethod
    def forward(ctx, y, x, lora_A, lora_B, scaling, dropout_p, seed, results):
        with below_autograd():  # mark_dirty counts the change
            xa, mask = _delta_op(y, x, lora_A, lora_B, scaling, dropout_p, seed)
        results += xa, mask
        ctx.mark_dirty(y)
        _, want_x, want_A, want_B, *_ = ctx.needs_input_grad
        # y is not read: any op may have produced it.
        _save(ctx, x, None, lora_A, lora_B, xa, mask, scaling, dropout_p, (want_x, False, want_A, want_B))
        return y

    @staticmethod
    def backward(ctx, grad_y):
        want_y, want_x, want_A, want_B, *_ = ctx.needs_input_grad
        grads = None, None, None
        if grad_y is not None and (want_x or want_A or want_B):
            grads = _gradients(ctx, "lora_delta_", grad_y, want_x, want_A, want_B)
        return grad_y if want_y else None, *grads, None, None, None, None


def _lora_delta_autograd(y, x, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    if has_tangent(y, x, lora_A, lora_B):
        return _delta_composite(y, x, lora_A, lora_B, scaling, dropout_p, seed)
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
        results = _delta_op(y, x, lora_A, lora_B, scaling, dropout_p, seed)
    count_change(y)
    return results


_linear_composite = register_composite("lora_linear", composite.lora_linear, num_cast=3)
LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd")
register_backward("lora_linear_backward", composite.lora_linear_backward)

# Not register_in_place(): in inference mode its kernel would cost as much as the op. functional.lora_delta_ does its
# work there.
_delta_composite = register_composite("lora_delta_", composite.lora_delta_)
LIBRARY.impl("lora_delta_", _lora_delta_autograd, "Autograd")


# --- autocast: x, weight and bias go to autocast's dtype as in nn.Linear; the adapter keeps its own -------------------

register_autocast("lora_linear", num_cast=3)
# y's dtype was settled by the base layer, and x has it or is cast to it by functional.lora_delta_.
register_autocast("lora_delta_", num_cast=0)
