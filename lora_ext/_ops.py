"""Fake (meta), autograd and autocast registrations of the compiled ops. csrc/library.cpp has their schemas.

The autograd kernel sits on the Autograd dispatch key itself, not behind ``torch.library.register_autograd``: it costs
half as much per call, and goes straight below autograd where no gradient is wanted.
"""

from __future__ import annotations

import torch

from . import _checks
from ._registration import (
    LIBRARY,
    below_autograd,
    bias_gradient,
    fake_gradients,
    fake_saved,
    mask_row_bytes,
    refuse_double_backward,
    refuse_forward_mode,
    register_autocast,
    weight_gradient,
)

# --- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


@torch.library.register_fake("lora_ext::lora_linear")
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    _checks.check_lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), *fake_saved(x, lora_A.shape[0], dropout_p)


@torch.library.register_fake("lora_ext::lora_linear_backward")
def _(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    want_x, want_A, want_B = output_mask
    return (
        grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if want_x else None,
        *(fake_gradients([lora_A]) if want_A else [None]),
        *(fake_gradients([lora_B]) if want_B else [None]),
    )


@torch.library.register_fake("lora_ext::lora_merge_plan")
def _(weights, lora_As, lora_Bs):
    _checks.check_merge("lora_merge_plan", weights, lora_As, lora_Bs)
    num_segments = sum(weight.shape[0] * _checks.merge_segments(weight.shape[1]) for weight in weights)
    return (
        weights[0].new_empty((len(weights),), dtype=torch.int64),
        weights[0].new_empty((num_segments,), dtype=torch.int16),
    )


@torch.library.register_fake("lora_ext::lora_merge_record_")
def _(weights, lora_As, lora_Bs):
    _checks.check_merge("lora_merge_record_", weights, lora_As, lora_Bs)
    num_corrections = [torch.library.get_ctx().new_dynamic_size() for _ in weights]
    return (
        weights[0].new_empty((len(weights),), dtype=torch.int64),
        [w.new_empty((w.shape[0], _checks.merge_segments(w.shape[1])), dtype=torch.int16) for w in weights],
        [w.new_empty((count,), dtype=torch.int16) for w, count in zip(weights, num_corrections, strict=True)],
    )


@torch.library.register_fake("lora_ext::lora_merge_")
def _(weights, lora_As, lora_Bs):
    _checks.check_merge("lora_merge_", weights, lora_As, lora_Bs)


@torch.library.register_fake("lora_ext::lora_merge_planned_")
def _(weights, lora_As, lora_Bs, words, corrections):
    _checks.check_merge("lora_merge_planned_", weights, lora_As, lora_Bs)


@torch.library.register_fake("lora_ext::lora_unmerge_")
def _(weights, lora_As, lora_Bs, words, corrections):
    _checks.check_merge("lora_unmerge_", weights, lora_As, lora_Bs)


@torch.library.register_fake("lora_ext::lora_dropout_mask")
def _(seed, num_tokens, in_features, dropout_p):
    return seed.new_empty((num_tokens, mask_row_bytes(in_features)), dtype=torch.uint8)


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
        # Only what a wanted gradient reads is kept alive. x is shared with its producer; dropout(x) never exists.
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
    refuse_forward_mode("lora_linear", x, weight, bias, lora_A, lora_B)
    if torch.is_grad_enabled() and (
        lora_A.requires_grad
        or lora_B.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    with below_autograd():
        return torch.ops.lora_ext.lora_linear.default(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def _lora_linear_backward_autograd(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    refuse_double_backward("lora_linear_backward", grad_y, x, weight, lora_A, lora_B, xa)
    with below_autograd():
        return torch.ops.lora_ext.lora_linear_backward.default(
            grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask
        )


def _lora_merge_plan_autograd(weights, lora_As, lora_Bs):
    with below_autograd():  # it returns counts
        return torch.ops.lora_ext.lora_merge_plan.default(weights, lora_As, lora_Bs)


def _changes_weights(op):
    """The autograd kernel of an op that changes its first argument, a list of weights, in place."""

    def autograd_kernel(weights, *arguments):
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            raise RuntimeError(
                f"{op.__name__}: weight requires grad; merging in place would corrupt its gradient. "
                "Call weight.requires_grad_(False) or merge under torch.no_grad()"
            )
        with below_autograd():
            result = op.default(weights, *arguments)
        if result is not None and not result[1]:  # lora_merge_record_ has merged nothing
            return result
        for weight in weights:
            if not weight.is_inference():
                torch.autograd.graph.increment_version(weight)  # mutating stable-ABI ops do not
        return result

    return autograd_kernel


LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd")
LIBRARY.impl("lora_linear_backward", _lora_linear_backward_autograd, "Autograd")
LIBRARY.impl("lora_merge_plan", _lora_merge_plan_autograd, "Autograd")
for _name in ("lora_merge_", "lora_merge_record_", "lora_merge_planned_", "lora_unmerge_"):
    LIBRARY.impl(_name, _changes_weights(getattr(torch.ops.lora_ext, _name)), "Autograd")


# --- autocast: x, weight and bias go to autocast's dtype as in nn.Linear; the adapter keeps its own -------------------

register_autocast("lora_linear", num_cast=3)
register_autocast("lora_linear_backward", num_cast=0)
