"""lora_grouped_ and lora_grouped_linear, for mixed batches: autograd function, fake kernels and registration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._load import op_named
from lora_ext._ops import plain, plain_grouped
from lora_ext._ops.errors import UNEXPLAINED
from lora_ext._ops.fast_path import below_autograd, call_backward, cast_to, lean_apply
from lora_ext._ops.in_place import check_recorded_change
from lora_ext._ops.linear import fake_gradients, fake_saved, keep
from lora_ext._ops.registration import OPS, register, register_backward

# --- autograd ---------------------------------------------------------------------------------------------------------

_op, _backward_op = map(op_named, ("lora_grouped_", "lora_grouped_backward"))


class _Grouped(torch.autograd.Function):
    """Returns only y, as lora_delta_ does: the results of the op are appended to ``results``.

    Autograd sees tensors only outside of lists: lora_As and lora_Bs come one after the other.
    """

    @staticmethod
    def forward(ctx, y, x, *arguments):
        *factors, group_of_row, scalings, ranks, dropout_p, seed, results = arguments
        n = len(factors) // 2
        with below_autograd():  # mark_dirty counts the change
            xa, mask = _op(y, x, factors[:n], factors[n:], group_of_row, scalings, ranks, dropout_p, seed)
        results += xa, mask
        ctx.mark_dirty(y)
        want_x, want_As, want_Bs = _split_wanted(ctx, n)
        wanted = want_x, any(want_As), any(want_Bs), False
        keep(ctx, x, xa, mask, *wanted, group_of_row, scalings, ranks, *factors)
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, xa, mask, group_of_row, scalings, ranks, *factors = ctx.saved_tensors
        n = len(factors) // 2
        groups = factors[:n], factors[n:], group_of_row, scalings, ranks
        want_x, want_As, want_Bs = _split_wanted(ctx, n)
        grad_x, grads = None, [None] * (2 * n)
        if grad_y is not None and (want_x or any(want_As) or any(want_Bs)):
            if any(want_Bs) and torch.is_grad_enabled():
                if x is None:
                    plain.check_x_is_kept("lora_grouped_", want_x)
                else:
                    xa, _ = plain_grouped.grouped_xa(x, factors[:n], *groups[2:], mask, ctx.dropout_p)
            grad_x, grad_As, grad_Bs = call_backward(
                _backward_op, grad_y, x, *groups, xa, mask, ctx.dropout_p, (want_x, *want_As, *want_Bs)
            )
            computed = iter((*grad_As, *grad_Bs))
            grads = [next(computed) if is_wanted else None for is_wanted in (*want_As, *want_Bs)]
        return grad_y if ctx.needs_input_grad[0] else None, grad_x, *grads, None, None, None, None, None, None


def _split_wanted(ctx, n: int) -> tuple[bool, tuple, tuple]:
    """Returns which gradients are wanted: of x, of each entry's lora_A, and of each entry's lora_B."""
    _, want_x, *factors = ctx.needs_input_grad[: 2 + 2 * n]
    return want_x, tuple(factors[:n]), tuple(factors[n:])


_apply = lean_apply(_Grouped, num_tensors=-3)


def _record(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed):
    numbers = group_of_row, scalings, ranks, dropout_p, seed
    if scalings is not None and scalings.requires_grad:
        raise RuntimeError("lora_grouped_: scalings requires grad, but the op computes no gradient of it; detach it")
    if len(lora_As) != len(lora_Bs):  # they cannot be told apart: the op refuses them
        with below_autograd():
            return _op(y, x, lora_As, lora_Bs, *numbers)
    kept = {"lora_As": lora_As, "lora_Bs": lora_Bs, "group_of_row": group_of_row, "scalings": scalings, "ranks": ranks}
    if any(lora_A.requires_grad for lora_A in lora_As):
        kept["x"] = x
    check_recorded_change("lora_grouped_", y, kept)
    results: list = []
    _apply(y, x, *lora_As, *lora_Bs, *numbers, results)
    return tuple(results)


def linear_and_grouped(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks) -> Tensor:
    """Computes lora_grouped_linear as two ops: what autograd records, and what devices without its kernel call.

    Raises:
        RuntimeError: the bias does not fit; F.linear would broadcast it.
    """
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError("lora_grouped_linear: the bias does not fit")
    y = F.linear(x, weight, bias)
    lora_grouped_(y, cast_to(y, x), lora_As, lora_Bs, group_of_row, scalings, ranks, 0.0, None)
    return y


def _record_linear(*arguments):
    try:
        return linear_and_grouped(*arguments)
    except UNEXPLAINED:
        OPS["lora_grouped_linear"].checked(*arguments)  # names the op and the argument
        raise


# --- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


def _fake(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed):
    return fake_saved(x, plain.largest_rank(lora_As), dropout_p)


def _fake_backward(grad_y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, xa, mask, dropout_p, output_mask):
    want_x, *wanted = output_mask
    factors = [factor for factor, is_wanted in zip((*lora_As, *lora_Bs), wanted, strict=True) if is_wanted]
    gradients = fake_gradients(factors)
    num_As = sum(wanted[: len(lora_As)])
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], lora_As[0].shape[-1])) if want_x else None
    return grad_x, gradients[:num_As], gradients[num_As:]


def _fake_linear(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# --- registration -----------------------------------------------------------------------------------------------------

# Autocast: as for lora_delta_ and lora_linear.
lora_grouped_ = register("lora_grouped_", _fake, plain=plain_grouped.lora_grouped_, record=_record, num_cast=0).call
lora_grouped_linear = register(
    "lora_grouped_linear",
    _fake_linear,
    plain=plain_grouped.lora_grouped_linear,
    record=_record_linear,
    num_cast=3,
).call
register_backward("lora_grouped_backward", _fake_backward, plain_grouped.lora_grouped_backward)
