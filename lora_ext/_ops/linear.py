"""Fake (meta), autograd and autocast registrations of the layer ops and lora_dropout_mask.

lora_linear computes a layer, lora_linear_siblings layers that read one x, lora_delta_ the update of a base layer that
was called. They have one autograd function. Their autograd kernels sit on the Autograd dispatch key itself, not behind
``torch.library.register_autograd``: that costs half as much per call, and goes straight below autograd where no
gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._ops import checks, composite, flops
from lora_ext._ops.fast_path import lean_apply, takes_fast_path
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

# --- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


@register_op("lora_linear", flops=lambda x, W, bias, A, B, *_, **__: flops.of_forward(x, [W], [A], [B]))
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), *fake_saved(x, lora_A.shape[0], dropout_p)


@register_op(
    "lora_linear_siblings", flops=lambda x, Ws, biases, bases, As, Bs, *_, **__: flops.of_forward(x, Ws, As, Bs)
)
def _(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed):
    ys = [x.new_empty((*x.shape[:-1], lora_B.shape[0])) for lora_B in lora_Bs]
    return ys, *fake_saved(x, sum(lora_A.shape[0] for lora_A in lora_As), dropout_p)


@register_op("lora_delta_", flops=lambda y, x, A, B, *_, **__: flops.of_forward(x, [None], [A], [B]))
def _(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    return fake_saved(x, lora_A.shape[0], dropout_p)


def _backward_flops(grad_y, x, W, A, B, xa, mask, scaling, dropout_p, wanted, **_) -> int:
    return flops.of_backward(grad_y, [W], [A], [B], wanted)


@register_op("lora_linear_backward", flops=_backward_flops)
def _(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    grad_x, *factors = fake_layer_gradients(grad_y, [lora_A], [lora_B], output_mask)
    return grad_x, *(grads[0] if grads else None for grads in factors)


def _siblings_backward_flops(grad_ys, x, Ws, As, Bs, xa, mask, scalings, dropout_p, wanted, **_) -> int:
    return flops.of_backward(grad_ys[0], Ws, As, Bs, wanted)


@register_op("lora_linear_siblings_backward", flops=_siblings_backward_flops)
def _(grad_ys, x, weights, lora_As, lora_Bs, xa, mask, scalings, dropout_p, output_mask):
    return fake_layer_gradients(grad_ys[0], lora_As, lora_Bs, output_mask)


@register_op("lora_dropout_mask", flops=lambda *_, **__: 0)
def _(seed, num_tokens, in_features, dropout_p):
    return seed.new_empty((num_tokens, checks.mask_row_bytes(in_features)), dtype=torch.uint8)


def _masks(info, in_dims, seed, *sizes):
    """Draws a mask for each seed: under vmap with ``randomness="different"`` every sample has one."""
    seeds = seed.movedim(in_dims[0], 0).unbind()
    return torch.stack([torch.ops.lora_ext.lora_dropout_mask.default(entry, *sizes) for entry in seeds]), 0


torch.library.register_vmap("lora_ext::lora_dropout_mask", _masks, lib=LIBRARY)

# --- autograd ---------------------------------------------------------------------------------------------------------

_linear_op, _siblings_op, _delta_op = map(op_named, ("lora_linear", "lora_linear_siblings", "lora_delta_"))
_linear_backward_op, _siblings_backward_op = map(op_named, ("lora_linear_backward", "lora_linear_siblings_backward"))


class _Layers(torch.autograd.Function):
    """Computes layers that read one x. Its tensors: their biases, x, their weights, lora_As and lora_Bs.

    Autograd sees tensors only outside of lists. Where base layers were called, their outputs are in place of the
    biases, and the weights are None. A single layer whose ``scalings`` is a number takes the op without lists:
    lora_linear, or lora_delta_, which changes the base layer's output: autograd wants what changes first.

    Returns only y, or the ys: every result costs time, and autograd lets no function with several results change a
    view, which nn.Linear returns. The other results of the op are appended to ``results``.
    """

    @staticmethod
    def forward(ctx, *arguments):
        tensors = arguments[:-4]
        scalings, dropout_p, seed, results = arguments[-4:]
        with below_autograd():
            if isinstance(scalings, (list, tuple)):
                n = len(scalings)
                biases, x, layers = tensors[:n], tensors[n], tensors[n + 1 :]
                weights, lora_As, lora_Bs = layers[:n], layers[n : 2 * n], layers[2 * n :]
                base = (weights, biases, []) if weights[0] is not None else ([], [], biases)
                y, xa, mask = _siblings_op(x, *base, lora_As, lora_Bs, scalings, dropout_p, seed)
                y = tuple(y)
                _, want_x, want_weights, want_As, want_Bs = _split_wanted(ctx, n)
                want_weight, want_A, want_B = any(want_weights), any(want_As), any(want_Bs)
            else:
                bias_or_y, x, weight, lora_A, lora_B = tensors
                layers = tensors[2:]
                if weight is not None:
                    y, xa, mask = _linear_op(x, weight, bias_or_y, lora_A, lora_B, scalings, dropout_p, seed)
                else:
                    y = bias_or_y
                    xa, mask = _delta_op(y, x, lora_A, lora_B, scalings, dropout_p, seed)
                    ctx.mark_dirty(y)  # counts the change, too
                _, want_x, want_weight, want_A, want_B = ctx.needs_input_grad[:5]
        if results is not None:
            results += xa, mask
        ctx.set_materialize_grads(False)
        # Only what a wanted gradient reads is kept alive. x is shared with its producer; dropout(x) never exists.
        ctx.save_for_backward(
            x if want_A or want_weight else None,
            xa if want_B else None,
            mask if (want_x or want_A) and mask.dim() == 2 else None,
            *layers,
        )
        ctx.numbers = scalings, dropout_p
        return y

    @staticmethod
    def backward(ctx, *grad_ys):
        scaling, dropout_p = ctx.numbers
        if isinstance(scaling, (list, tuple)):
            return _gradients_of_siblings(ctx, grad_ys)
        (grad_y,) = grad_ys
        if grad_y is None:
            return (None,) * 9
        x, xa, mask, weight, lora_A, lora_B = ctx.saved_tensors
        want_bias, want_x, want_weight, want_A, want_B = ctx.needs_input_grad[:5]
        grad_x = grad_A = grad_B = grad_weight = grad_bias = None
        if want_x or want_A or want_B:
            wanted = want_x, want_A, want_B
            if want_B and torch.is_grad_enabled():
                op = "lora_delta_" if weight is None else "lora_linear"
                xa = composite.xa_to_differentiate(op, xa, x, want_x, [lora_A], mask, [scaling], dropout_p)
            grad_x, grad_A, grad_B = call_backward(
                _linear_backward_op, grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, wanted
            )
        # Weight and bias are frozen in LoRA; a user who unfreezes them gets the plain linear layer's gradients.
        if want_weight:
            grad_weight = weight_gradient(grad_y, x)
        if want_bias:
            grad_bias = grad_y if weight is None else bias_gradient(grad_y)
        return grad_bias, grad_x, grad_weight, grad_A, grad_B, None, None, None, None


def _split_wanted(ctx, n: int) -> tuple[tuple, bool, tuple, tuple, tuple]:
    """Returns which gradients are wanted: of each layer's bias, of x, and of each layer's weight, lora_A and lora_B."""
    wanted = ctx.needs_input_grad
    return wanted[:n], wanted[n], *(wanted[i : i + n] for i in range(n + 1, 4 * n + 1, n))


def _gradients_of_siblings(ctx, grad_ys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    n, (scalings, dropout_p) = len(grad_ys), ctx.numbers
    x, xa, mask, *layers = ctx.saved_tensors
    weights, lora_As, lora_Bs = layers[:n], layers[n : 2 * n], layers[2 * n :]
    has_weights = weights[0] is not None
    want_biases, want_x, want_weights, want_As, want_Bs = _split_wanted(ctx, n)
    grad_x = None
    grad_weights, grad_biases, grad_As, grad_Bs = ([None] * n for _ in range(4))

    # An output that the loss does not depend on has no gradient: its layer is left out.
    used = [i for i in range(n) if grad_ys[i] is not None and (want_x or want_As[i] or want_Bs[i])]
    if used:
        wanted = want_x, any(want_As[i] for i in used), any(want_Bs[i] for i in used)
        if wanted[2] and torch.is_grad_enabled():
            op = "lora_linear_siblings"
            xa = composite.xa_to_differentiate(op, xa, x, want_x, lora_As, mask, scalings, dropout_p)
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
            grad_weights[i] = weight_gradient(grad_y, x)
        if grad_y is not None and want_biases[i]:
            grad_biases[i] = bias_gradient(grad_y) if has_weights else grad_y
    return *grad_biases, grad_x, *grad_weights, *grad_As, *grad_Bs, None, None, None, None


_lean_apply = lean_apply(_Layers, num_tensors=-4)


def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> Tensor:
    """Calls the op for y alone; the fast path skips the dispatcher's round through the autograd kernel below."""
    if not takes_fast_path(x, weight, bias, lora_A, lora_B):
        return _linear_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
    if any_requires_grad(lora_A, lora_B, x, weight, bias):
        return _lean_apply(bias, x, weight, lora_A, lora_B, scaling, dropout_p, seed, None)
    with below_autograd():
        return _linear_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]


def lora_linear_siblings(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed) -> list[Tensor]:
    """Calls the op for the ys alone, as :func:`lora_linear`."""
    tensors = _one_after_the_other(x, weights, biases, bases, lora_As, lora_Bs, scalings)
    if tensors is not None and takes_fast_path(*tensors):
        if any_requires_grad(*lora_As, *tensors):
            return list(_lean_apply(*tensors, scalings, dropout_p, seed, None))
        with below_autograd():
            return _siblings_op(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)[0]
    return _siblings_op(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)[0]


def _one_after_the_other(x, weights, biases, bases, lora_As, lora_Bs, scalings) -> Sequence[Tensor | None] | None:
    """Returns the tensors as ``_Layers`` takes them.

    None if the lengths of the lists do not fit: the layers cannot be told apart, and the op refuses them.
    """
    n = len(scalings)
    has_base = len(bases) == n and not (weights or biases) if bases else len(weights) == len(biases) == n
    if not has_base or not n == len(lora_As) == len(lora_Bs) > 0:
        return None
    return (*(biases or bases), x, *(weights or [None] * n), *lora_As, *lora_Bs)


def _linear_autograd(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    tensors, numbers = (x, weight, bias, lora_A, lora_B), (scaling, dropout_p, seed)
    if has_tangent(*tensors):
        return _linear_composite(*tensors, *numbers)
    if any_requires_grad(*tensors):
        results: list = []
        return _Layers.apply(bias, x, weight, lora_A, lora_B, *numbers, results), *results
    with below_autograd():
        return _linear_op(*tensors, *numbers)


def _siblings_autograd(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p=0.0, seed=None):
    tensors = (x, *weights, *biases, *bases, *lora_As, *lora_Bs)
    if has_tangent(*tensors):
        return _siblings_composite(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)
    in_order = _one_after_the_other(x, weights, biases, bases, lora_As, lora_Bs, scalings)
    if in_order is not None and any_requires_grad(*tensors):
        results: list = []
        return list(_Layers.apply(*in_order, scalings, dropout_p, seed, results)), *results
    with below_autograd():
        return _siblings_op(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)


def _delta_autograd(y, x, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    numbers = scaling, dropout_p, seed
    if has_tangent(y, x, lora_A, lora_B):
        return _delta_composite(y, x, lora_A, lora_B, *numbers)
    if any_requires_grad(y, x, lora_A, lora_B):
        check_recorded_change("lora_delta_", "y", y)
        check_saved("lora_delta_", "lora_A", lora_A)
        check_saved("lora_delta_", "lora_B", lora_B)
        if lora_A is not None and lora_A.requires_grad:
            check_saved("lora_delta_", "x", x)
        results: list = []
        _Layers.apply(y, x, None, lora_A, lora_B, *numbers, results)
        return tuple(results)
    check_inference("lora_delta_", "y", y)
    with below_autograd():
        results = _delta_op(y, x, lora_A, lora_B, *numbers)
    count_change(y)
    return results


def _siblings_cast(x, weights, *others) -> int:
    """Without weights the dtype was settled by the base layers, and functional.lora_delta_siblings casts x to it."""
    return 3 if weights else 0


# Autocast: x, weight and bias go to autocast's dtype as in nn.Linear; the adapter keeps its own. y's dtype was settled
# by the base layer, and x has it or is cast to it by functional.lora_delta_.
_linear_composite = register_composite("lora_linear", composite.lora_linear, num_cast=3)
_siblings_composite = register_composite("lora_linear_siblings", composite.lora_linear_siblings, _siblings_cast)
_delta_composite = register_composite("lora_delta_", composite.lora_delta_)
for _name, _kernel, _num_cast in (
    ("lora_linear", _linear_autograd, 3),
    ("lora_linear_siblings", _siblings_autograd, _siblings_cast),
    # Not register_in_place(): in inference mode its kernel would cost as much as the op. functional.lora_delta_ does
    # its work there.
    ("lora_delta_", _delta_autograd, 0),
):
    LIBRARY.impl(_name, _kernel, "Autograd")
    register_autocast(_name, _num_cast)
register_backward("lora_linear_backward", composite.lora_linear_backward)
register_backward("lora_linear_siblings_backward", composite.lora_linear_siblings_backward)
