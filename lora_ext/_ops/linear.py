"""The layer ops and lora_dropout_mask: autograd functions, fake kernels and registration.

lora_linear computes a layer, lora_delta_ the update of a base layer that was called, lora_linear_siblings layers that
read one x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext import reference
from lora_ext._load import op_named
from lora_ext._ops import plain
from lora_ext._ops.checks import accumulation_dtype, count_tokens, mask_row_bytes
from lora_ext._ops.fast_path import below_autograd, call_backward, lean_apply
from lora_ext._ops.in_place import check_recorded_change
from lora_ext._ops.registration import LIBRARY, register, register_backward

# --- autograd ---------------------------------------------------------------------------------------------------------

_linear_op, _siblings_op, _delta_op = map(op_named, ("lora_linear", "lora_linear_siblings", "lora_delta_"))
_linear_backward_op, _siblings_backward_op = map(op_named, ("lora_linear_backward", "lora_linear_siblings_backward"))


def keep(ctx, x, xa, mask, want_x: bool, want_A: bool, want_B: bool, want_weight: bool, *others: Tensor | None) -> None:
    """Keeps alive what a wanted gradient reads. x is shared with its producer; dropout(x) never exists."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if want_A or want_weight else None,
        xa if want_B else None,
        mask if (want_x or want_A) and mask.dim() == 2 else None,
        *others,
    )


class _Layer(torch.autograd.Function):
    """Computes a layer. Where the base layer was called, the weight is None, and y, which changes, in the bias's place.

    Returns only y: every result costs time, and autograd lets no function with several results change a view, which
    nn.Linear returns. The other results of the op are appended to ``results``.
    """

    @staticmethod
    def forward(ctx, bias_or_y, x, weight, lora_A, lora_B, scaling, dropout_p, seed, results):
        with below_autograd():
            if weight is not None:
                y, xa, mask = _linear_op(x, weight, bias_or_y, lora_A, lora_B, scaling, dropout_p, seed)
            else:
                y = bias_or_y
                xa, mask = _delta_op(y, x, lora_A, lora_B, scaling, dropout_p, seed)
                ctx.mark_dirty(y)  # counts the change, too
        results += xa, mask
        _, want_x, want_weight, want_A, want_B = ctx.needs_input_grad[:5]
        keep(ctx, x, xa, mask, want_x, want_A, want_B, want_weight, weight, lora_A, lora_B)
        ctx.numbers = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return (None,) * 9
        scaling, dropout_p = ctx.numbers
        x, xa, mask, weight, lora_A, lora_B = ctx.saved_tensors
        want_bias, want_x, want_weight, want_A, want_B = ctx.needs_input_grad[:5]
        grad_x = grad_A = grad_B = grad_weight = grad_bias = None
        if want_x or want_A or want_B:
            if want_B and torch.is_grad_enabled():
                op = "lora_delta_" if weight is None else "lora_linear"
                xa = plain.xa_to_differentiate(op, xa, x, want_x, [lora_A], mask, [scaling], dropout_p)
            wanted = want_x, want_A, want_B
            grad_x, grad_A, grad_B = call_backward(
                _linear_backward_op, grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, wanted
            )
        # Weight and bias are frozen in LoRA; a user who unfreezes them gets the plain linear layer's gradients.
        if want_weight:
            grad_weight = plain.weight_gradient(grad_y, x)
        if want_bias:
            grad_bias = grad_y if weight is None else plain.bias_gradient(grad_y)
        return grad_bias, grad_x, grad_weight, grad_A, grad_B, None, None, None, None


class _Siblings(torch.autograd.Function):
    """Computes layers that read one x, as :class:`_Layer`.

    Autograd sees tensors only outside of lists: they come as :func:`_one_after_the_other` has them.
    """

    @staticmethod
    def forward(ctx, *arguments):
        scalings, dropout_p, seed, results = arguments[-4:]
        biases, x, weights, lora_As, lora_Bs = _split(arguments, len(scalings))
        base = (weights, biases, []) if weights[0] is not None else ([], [], biases)
        with below_autograd():
            ys, xa, mask = _siblings_op(x, *base, lora_As, lora_Bs, scalings, dropout_p, seed)
        results += xa, mask
        _, want_x, want_weights, want_As, want_Bs = _split(ctx.needs_input_grad, len(scalings))
        wanted = want_x, any(want_As), any(want_Bs), any(want_weights)
        keep(ctx, x, xa, mask, *wanted, *weights, *lora_As, *lora_Bs)
        ctx.numbers = scalings, dropout_p
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grad_ys):
        n, (scalings, dropout_p) = len(grad_ys), ctx.numbers
        x, xa, mask, *layers = ctx.saved_tensors
        weights, lora_As, lora_Bs = layers[:n], layers[n : 2 * n], layers[2 * n :]
        has_weights = weights[0] is not None
        want_biases, want_x, want_weights, want_As, want_Bs = _split(ctx.needs_input_grad, n)
        grad_x = None
        grad_weights, grad_biases, grad_As, grad_Bs = ([None] * n for _ in range(4))

        # An output that the loss does not depend on has no gradient: its layer is left out.
        used = [i for i in range(n) if grad_ys[i] is not None and (want_x or want_As[i] or want_Bs[i])]
        if used:
            wanted = want_x, any(want_As[i] for i in used), any(want_Bs[i] for i in used)
            if wanted[2] and torch.is_grad_enabled():
                op = "lora_linear_siblings"
                xa = plain.xa_to_differentiate(op, xa, x, want_x, lora_As, mask, scalings, dropout_p)
            if wanted[2] and len(used) < n:
                columns = xa.split([lora_A.shape[0] for lora_A in lora_As], dim=1)
                xa = torch.cat([columns[i] for i in used], dim=1)
            ys, Ws, As, Bs, numbers = (
                [entries[i] for i in used] for entries in (grad_ys, weights, lora_As, lora_Bs, scalings)
            )
            saved = x if wanted[1] else None, Ws if has_weights else [], As, Bs, xa if wanted[2] else None, mask
            grad_x, used_grad_As, used_grad_Bs = call_backward(
                _siblings_backward_op, ys, *saved, numbers, dropout_p, wanted
            )
            for i, grad in zip(used, used_grad_As, strict=False):  # empty where no layer wants any
                grad_As[i] = grad if want_As[i] else None
            for i, grad in zip(used, used_grad_Bs, strict=False):
                grad_Bs[i] = grad if want_Bs[i] else None
        for i, grad_y in enumerate(grad_ys):
            if grad_y is not None and want_weights[i]:
                grad_weights[i] = plain.weight_gradient(grad_y, x)
            if grad_y is not None and want_biases[i]:
                grad_biases[i] = plain.bias_gradient(grad_y) if has_weights else grad_y
        return *grad_biases, grad_x, *grad_weights, *grad_As, *grad_Bs, None, None, None, None


def _one_after_the_other(x, weights, biases, bases, lora_As, lora_Bs, n: int) -> Sequence[Tensor | None] | None:
    """Returns the tensors of ``n`` layers: biases or bases, x, weights or None, lora_As, lora_Bs.

    None if the lengths of the lists do not fit: the layers cannot be told apart, and the op refuses them.
    """
    has_base = len(bases) == n and not (weights or biases) if bases else len(weights) == len(biases) == n
    if not has_base or not n == len(lora_As) == len(lora_Bs) > 0:
        return None
    return (*(biases or bases), x, *(weights or [None] * n), *lora_As, *lora_Bs)


def _split(values: Sequence, n: int) -> tuple:
    """Splits what :func:`_one_after_the_other` joins, or facts about these tensors."""
    A, B, end = 2 * n + 1, 3 * n + 1, 4 * n + 1
    return values[:n], values[n], values[n + 1 : A], values[A:B], values[B:end]


_apply_layer = lean_apply(_Layer, num_tensors=-4)
_apply_siblings = lean_apply(_Siblings, num_tensors=-4)


def _record_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    results: list = []
    return _apply_layer(bias, x, weight, lora_A, lora_B, scaling, dropout_p, seed, results), *results


def _record_delta(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    reads_x = lora_A is not None and lora_A.requires_grad
    check_recorded_change("lora_delta_", y, {"lora_A": lora_A, "lora_B": lora_B, "x": x if reads_x else None})
    results: list = []
    _apply_layer(y, x, None, lora_A, lora_B, scaling, dropout_p, seed, results)
    return tuple(results)


def _record_siblings(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed):
    tensors = _one_after_the_other(x, weights, biases, bases, lora_As, lora_Bs, len(scalings))
    if tensors is None:
        with below_autograd():
            return _siblings_op(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)
    results: list = []
    return list(_apply_siblings(*tensors, scalings, dropout_p, seed, results)), *results


# --- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


def fake_saved(x: Tensor, total_rank: int, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Returns what a forward saves for its backward, without values: xa and the bit mask."""
    num_tokens = count_tokens(x)
    has_mask = reference.dropout_threshold(dropout_p) > 0
    return (
        x.new_empty((num_tokens, total_rank), dtype=accumulation_dtype(x.dtype)),
        x.new_empty((num_tokens, mask_row_bytes(x.shape[-1])) if has_mask else (0,), dtype=torch.uint8),
    )


def fake_gradients(factors: Sequence[Tensor]) -> list[Tensor]:
    """Returns gradients of factors without values: contiguous, even if the factors are not."""
    return [torch.empty_like(factor, memory_format=torch.contiguous_format) for factor in factors]


def _fake_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), *fake_saved(x, lora_A.shape[0], dropout_p)


def _fake_delta(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    return fake_saved(x, lora_A.shape[0], dropout_p)


def _fake_siblings(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed):
    ys = [x.new_empty((*x.shape[:-1], lora_B.shape[0])) for lora_B in lora_Bs]
    return ys, *fake_saved(x, sum(lora_A.shape[0] for lora_A in lora_As), dropout_p)


def _fake_siblings_backward(grad_ys, x, weights, lora_As, lora_Bs, xa, mask, scalings, dropout_p, output_mask):
    want_x, want_A, want_B = output_mask
    grad_x = grad_ys[0].new_empty((*grad_ys[0].shape[:-1], lora_As[0].shape[-1])) if want_x else None
    return grad_x, fake_gradients(lora_As) if want_A else [], fake_gradients(lora_Bs) if want_B else []


def _fake_linear_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    grad_x, *grads = _fake_siblings_backward(
        [grad_y], x, [weight], [lora_A], [lora_B], xa, mask, [scaling], dropout_p, output_mask
    )
    return grad_x, *(grad[0] if grad else None for grad in grads)


def _fake_mask(seed, num_tokens, in_features, dropout_p):
    return seed.new_empty((num_tokens, mask_row_bytes(in_features)), dtype=torch.uint8)


# --- registration -----------------------------------------------------------------------------------------------------


def _siblings_cast(x, weights, *others) -> int:
    """Without weights the dtype was settled by the base layers, and functional.lora_delta_siblings casts x to it."""
    return 3 if weights else 0


# Autocast: x, weight and bias go to autocast's dtype as in nn.Linear; the adapter keeps its own. y's dtype was settled
# by the base layer, and x has it or is cast to it by functional.lora_delta_.
lora_linear = register("lora_linear", _fake_linear, plain=plain.lora_linear, record=_record_linear, num_cast=3).call
lora_delta_ = register("lora_delta_", _fake_delta, plain=plain.lora_delta_, record=_record_delta, num_cast=0).call
lora_linear_siblings = register(
    "lora_linear_siblings",
    _fake_siblings,
    plain=plain.lora_linear_siblings,
    record=_record_siblings,
    num_cast=_siblings_cast,
).call
register_backward("lora_linear_backward", _fake_linear_backward, plain.lora_linear_backward)
register_backward("lora_linear_siblings_backward", _fake_siblings_backward, plain.lora_linear_siblings_backward)
register("lora_dropout_mask", _fake_mask)


def _masks(info, in_dims, seed, *sizes):
    """Draws a mask for each seed: under vmap with ``randomness="different"`` every sample has one."""
    seeds = seed.movedim(in_dims[0], 0).unbind()
    return torch.stack([torch.ops.lora_ext.lora_dropout_mask.default(entry, *sizes) for entry in seeds]), 0


torch.library.register_vmap("lora_ext::lora_dropout_mask", _masks, lib=LIBRARY)
