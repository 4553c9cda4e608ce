"""Fake (meta), autograd and autocast registrations of the compiled ops. csrc/library.cpp has their schemas.

The autograd kernel sits on the Autograd dispatch key itself, not behind ``torch.library.register_autograd``: it costs
half as much per call, and goes straight below autograd where no gradient is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks
from .reference import dropout_threshold

_LIBRARY = torch.library.Library("lora_ext", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _mask_row_bytes(in_features: int) -> int:
    """Bytes of one row of the bit mask: whole 64-bit words. csrc/common/dropout.h."""
    return (in_features + 63) // 64 * 8


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


@torch.library.register_fake("lora_ext::lora_linear")
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    _checks.check_lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    num_tokens = 1
    for size in x.shape[:-1]:
        num_tokens = num_tokens * size
    has_mask = dropout_threshold(dropout_p) > 0
    return (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        x.new_empty((num_tokens, lora_A.shape[0]), dtype=_accumulation_dtype(x.dtype)),
        x.new_empty((num_tokens, _mask_row_bytes(x.shape[-1])) if has_mask else (0,), dtype=torch.uint8),
    )


@torch.library.register_fake("lora_ext::lora_linear_backward")
def _(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    want_x, want_A, want_B = output_mask
    return (
        grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if want_x else None,
        torch.empty_like(lora_A, memory_format=torch.contiguous_format) if want_A else None,
        torch.empty_like(lora_B, memory_format=torch.contiguous_format) if want_B else None,
    )


@torch.library.register_fake("lora_ext::lora_merge_plan")
def _(weights, lora_A, lora_B):
    _checks.check_merge("lora_merge_plan", weights, lora_A, lora_B)
    num_segments = sum(weight.shape[0] * _checks.merge_segments(weight.shape[1]) for weight in weights)
    return (
        weights[0].new_empty((len(weights),), dtype=torch.int64),
        weights[0].new_empty((num_segments,), dtype=torch.int16),
    )


@torch.library.register_fake("lora_ext::lora_merge_")
def _(weights, lora_A, lora_B, ends, corrections):
    _checks.check_merge("lora_merge_", weights, lora_A, lora_B)


@torch.library.register_fake("lora_ext::lora_unmerge_")
def _(weights, lora_A, lora_B, ends, corrections):
    _checks.check_merge("lora_unmerge_", weights, lora_A, lora_B)


@torch.library.register_fake("lora_ext::lora_dropout_mask")
def _(seed, num_tokens, in_features, dropout_p):
    return seed.new_empty((num_tokens, _mask_row_bytes(in_features)), dtype=torch.uint8)


# --- autograd ---------------------------------------------------------------------------------------------------------


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
        with _below_autograd():
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
            grad_weight = grad_y.flatten(0, -2).T @ x.flatten(0, -2) if x.dim() > 1 else torch.outer(grad_y, x)
        if want_bias:
            grad_bias = grad_y.flatten(0, -2).sum(0) if grad_y.dim() > 1 else grad_y
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Below autograd a tangent would be dropped, and read as zero."""
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise RuntimeError(
            "lora_linear: forward-mode differentiation (jvp) is not supported; "
            "use lora_ext.reference.lora_linear where you need it"
        )


def _lora_linear_autograd(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    _refuse_forward_mode(x, weight, bias, lora_A, lora_B)
    if torch.is_grad_enabled() and (
        lora_A.requires_grad
        or lora_B.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    with _below_autograd():
        return torch.ops.lora_ext.lora_linear.default(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def _lora_linear_backward_autograd(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (grad_y, x, weight, lora_A, lora_B, xa)
    ):
        raise RuntimeError(
            "lora_linear_backward: gradients of gradients (create_graph=True) are not supported; "
            "use lora_ext.reference.lora_linear where you need them"
        )
    with _below_autograd():
        return torch.ops.lora_ext.lora_linear_backward.default(
            grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask
        )


def _lora_merge_plan_autograd(weights, lora_A, lora_B):
    with _below_autograd():  # it returns counts
        return torch.ops.lora_ext.lora_merge_plan.default(weights, lora_A, lora_B)


def _changes_weights(op):
    """The autograd kernel of an op that changes its first argument, a list of weights, in place."""

    def autograd_kernel(weights, lora_A, lora_B, ends, corrections):
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            raise RuntimeError(
                f"{op.__name__}: weight requires grad; merging in place would corrupt its gradient. "
                "Call weight.requires_grad_(False) or merge under torch.no_grad()"
            )
        with _below_autograd():
            op.default(weights, lora_A, lora_B, ends, corrections)
        for weight in weights:
            if not weight.is_inference():
                torch.autograd.graph.increment_version(weight)  # mutating stable-ABI ops do not

    return autograd_kernel


_LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd")
_LIBRARY.impl("lora_linear_backward", _lora_linear_backward_autograd, "Autograd")
_LIBRARY.impl("lora_merge_plan", _lora_merge_plan_autograd, "Autograd")
_LIBRARY.impl("lora_merge_", _changes_weights(torch.ops.lora_ext.lora_merge_), "Autograd")
_LIBRARY.impl("lora_unmerge_", _changes_weights(torch.ops.lora_ext.lora_unmerge_), "Autograd")


# --- autocast: x, weight and bias go to autocast's dtype as in nn.Linear; the adapter keeps its own -------------------


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        # As ATen's autocast: float64 stays, everything else that floats is cast.
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.lora_ext.lora_linear.default(
                cast(x, dtype), cast(weight, dtype), cast(bias, dtype), lora_A, lora_B, scaling, dropout_p, seed
            )

    def lora_linear_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
        # Dtypes were settled in the forward; without this, products inside would be autocast once more.
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.lora_ext.lora_linear_backward.default(
                grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask
            )

    _LIBRARY.impl("lora_linear", lora_linear, dispatch_key)
    _LIBRARY.impl("lora_linear_backward", lora_linear_backward, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
