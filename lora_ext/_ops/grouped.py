"""Fake (meta), autograd and autocast registrations of lora_grouped_ and lora_grouped_linear: mixed batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._ops import composite, composite_grouped, flops
from lora_ext._ops.fast_path import takes_fast_path
from lora_ext._ops.in_place import check_inference, check_recorded_change, check_saved, count_change
from lora_ext._ops.registration import (
    LIBRARY,
    any_requires_grad,
    below_autograd,
    call_backward,
    checked_arguments,
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


def _forward_flops(y, x, As, Bs, *_, **__) -> int:
    return flops.of_forward(x, [None], [flops.largest_matrix(As)], [flops.largest_matrix(Bs)])


def _backward_flops(grad_y, x, As, Bs, groups, scalings, ranks, xa, mask, dropout_p, wanted, **_) -> int:
    want_x, *of_factors = wanted
    wanted = want_x, any(of_factors[: len(As)]), any(of_factors[len(As) :])
    return flops.of_backward(grad_y, [None], [flops.largest_matrix(As)], [flops.largest_matrix(Bs)], wanted)


@register_op("lora_grouped_", flops=_forward_flops)
def _(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed):
    return fake_saved(x, composite.largest_rank(lora_As), dropout_p)


@register_op("lora_grouped_backward", flops=_backward_flops)
def _(grad_y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, xa, mask, dropout_p, output_mask):
    want_x, *wanted = output_mask
    factors = [factor for factor, is_wanted in zip((*lora_As, *lora_Bs), wanted, strict=True) if is_wanted]
    gradients = fake_gradients(factors)
    num_As = sum(wanted[: len(lora_As)])
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], lora_As[0].shape[-1])) if want_x else None
    return grad_x, gradients[:num_As], gradients[num_As:]


def _linear_flops(x, weight, bias, As, Bs, *_, **__) -> int:
    return flops.of_forward(x, [weight], [flops.largest_matrix(As)], [flops.largest_matrix(Bs)])


@register_op("lora_grouped_linear", flops=_linear_flops)
def _(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# --- autograd ---------------------------------------------------------------------------------------------------------


class _LoraGrouped(torch.autograd.Function):
    """Returns only y, as lora_delta_ does: the results of the op are appended to ``results``.

    Autograd sees tensors only outside of lists: lora_As and lora_Bs come one after the other.
    """

    @staticmethod
    def forward(ctx, y, x, group_of_row, scalings, ranks, dropout_p, seed, results, *factors):
        n = len(factors) // 2
        with below_autograd():  # mark_dirty counts the change
            xa, mask = _op(y, x, factors[:n], factors[n:], group_of_row, scalings, ranks, dropout_p, seed)
        results += xa, mask
        ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        want_x, want_As, want_Bs = _split_wanted(ctx)
        has_mask = mask.dim() == 2 and (want_x or any(want_As))
        # Keeps alive only what a wanted gradient reads.
        ctx.save_for_backward(
            x if any(want_As) else None,
            group_of_row,
            scalings,
            ranks,
            xa if any(want_Bs) else None,
            mask if has_mask else None,
            *factors,
        )
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, group_of_row, scalings, ranks, xa, mask, *factors = ctx.saved_tensors
        n = len(factors) // 2
        lora_As, lora_Bs = factors[:n], factors[n:]
        want_x, want_As, want_Bs = _split_wanted(ctx)
        grad_x, grads = None, [None] * (2 * n)
        if grad_y is not None and (want_x or any(want_As) or any(want_Bs)):
            if any(want_Bs) and torch.is_grad_enabled():
                if x is None:
                    composite.check_x_is_kept("lora_grouped_", want_x)
                else:
                    xa, _ = composite_grouped.grouped_xa(x, lora_As, group_of_row, scalings, ranks, mask, ctx.dropout_p)
            grad_x, grad_As, grad_Bs = call_backward(
                _backward_op,
                grad_y,
                x,
                lora_As,
                lora_Bs,
                group_of_row,
                scalings,
                ranks,
                xa,
                mask,
                ctx.dropout_p,
                (want_x, *want_As, *want_Bs),
            )
            computed = iter((*grad_As, *grad_Bs))
            grads = [next(computed) if is_wanted else None for is_wanted in (*want_As, *want_Bs)]
        return grad_y if ctx.needs_input_grad[0] else None, grad_x, None, None, None, None, None, None, *grads


def _split_wanted(ctx) -> tuple[bool, tuple, tuple]:
    """Returns which gradients are wanted: of x, of each entry's lora_A, and of each entry's lora_B."""
    _, want_x, _, _, _, _, _, _, *factors = ctx.needs_input_grad
    n = len(factors) // 2
    return want_x, tuple(factors[:n]), tuple(factors[n:])


def lora_grouped_(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed) -> None:
    """Calls the op; without gradients the fast path skips the dispatcher's round through the autograd kernel below.

    That round converts lists of 64 factors once more, which takes 20 us.
    """
    check_inference("lora_grouped_", "y", y)
    tensors = y, x, *lora_As, *lora_Bs, group_of_row, scalings, ranks, seed
    if takes_fast_path(*tensors) and not any_requires_grad(*tensors):
        with below_autograd():
            _op(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed)
        count_change(y)
        return
    _op(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed)
    if torch.is_inference_mode_enabled() and not y.is_inference():  # there the op's autograd kernel is not called
        count_change(y)


def _lora_grouped_autograd(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks=None, dropout_p=0.0, seed=None):
    factors = (*lora_As, *lora_Bs)
    if scalings is not None and scalings.requires_grad:
        raise RuntimeError("lora_grouped_: scalings requires grad, but the op computes no gradient of it; detach it")
    if has_tangent(y, x, *factors):
        return _composite(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed)
    # Lists of other lengths cannot be told apart, and are left for the op to refuse.
    if len(lora_As) == len(lora_Bs) and any_requires_grad(y, x, *factors):
        check_recorded_change("lora_grouped_", "y", y)
        for name, tensors in (("lora_As", lora_As), ("lora_Bs", lora_Bs)):
            for i, tensor in enumerate(tensors):
                check_saved("lora_grouped_", f"{name}[{i}]", tensor)
        numbers = {"group_of_row": group_of_row, "scalings": scalings, "ranks": ranks}
        if any(lora_A.requires_grad for lora_A in lora_As):
            numbers["x"] = x
        for name, tensor in numbers.items():
            check_saved("lora_grouped_", name, tensor)
        results: list = []
        _LoraGrouped.apply(y, x, group_of_row, scalings, ranks, dropout_p, seed, results, *factors)
        return tuple(results)
    check_inference("lora_grouped_", "y", y)
    with below_autograd():
        results = _op(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed)
    count_change(y)
    return results


# --- a linear layer and lora_grouped_: the kernel is for inference on the CPU, autograd records the two ---------------


def lora_grouped_linear(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks) -> Tensor | None:
    """Calls the op if it has a kernel: on the CPU, without gradients. None: it has none."""
    tensors = x, weight, *lora_As, *lora_Bs, group_of_row, scalings, bias, ranks
    if x.device.type != "cpu" or any_requires_grad(*tensors):
        return None
    if not takes_fast_path(*tensors):
        return _linear_op(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
    with below_autograd():
        return _linear_op(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)


def _lora_grouped_linear_autograd(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks=None):
    tensors = x, weight, bias, *lora_As, *lora_Bs
    if has_tangent(*tensors):
        return _linear_composite(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
    if any_requires_grad(*tensors, scalings):
        checked_arguments["lora_grouped_linear"](x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
        y = F.linear(x, weight, bias)
        torch.ops.lora_ext.lora_grouped_.default(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks)
        return y
    with below_autograd():
        return _linear_op(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)


_op, _backward_op, _linear_op = map(op_named, ("lora_grouped_", "lora_grouped_backward", "lora_grouped_linear"))
_composite = register_composite("lora_grouped_", composite_grouped.lora_grouped_)
LIBRARY.impl("lora_grouped_", _lora_grouped_autograd, "Autograd")
register_backward("lora_grouped_backward", composite_grouped.lora_grouped_backward)
# As lora_delta_: y's dtype was settled by the base layer, and functional.lora_grouped_ casts x to it.
register_autocast("lora_grouped_", num_cast=0)
_linear_composite = register_composite("lora_grouped_linear", composite_grouped.lora_grouped_linear, num_cast=3)
LIBRARY.impl("lora_grouped_linear", _lora_grouped_linear_autograd, "Autograd")
register_autocast("lora_grouped_linear", num_cast=3)  # as lora_linear: the adapters keep their dtype
