"""Fake (meta), autograd and autocast registrations of lora_linear_siblings, for layers that read one x."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext._ops import composite, flops
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


@register_op(
    "lora_linear_siblings", flops=lambda x, Ws, biases, bases, As, Bs, *_, **__: flops.of_forward(x, Ws, As, Bs)
)
def _(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed):
    ys = [x.new_empty((*x.shape[:-1], lora_B.shape[0])) for lora_B in lora_Bs]
    return ys, *fake_saved(x, sum(lora_A.shape[0] for lora_A in lora_As), dropout_p)


def _backward_flops(grad_ys, x, Ws, As, Bs, xa, mask, scalings, dropout_p, wanted, **_) -> int:
    return flops.of_backward(grad_ys[0], Ws, As, Bs, wanted)


@register_op("lora_linear_siblings_backward", flops=_backward_flops)
def _(grad_ys, x, weights, lora_As, lora_Bs, xa, mask, scalings, dropout_p, output_mask):
    return fake_layer_gradients(grad_ys[0], lora_As, lora_Bs, output_mask)


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Siblings(torch.autograd.Function):
    """Autograd sees tensors only outside of lists: x, weights, biases, lora_As and lora_Bs come one after the other.

    Where base layers were called, their outputs are in place of the biases, and the weights are None. Returns only the
    ys; the other results of the op are appended to ``results``.
    """

    @staticmethod
    def forward(ctx, *arguments):
        x, *layers, scalings, dropout_p, seed, results = arguments
        n = len(scalings)
        weights, biases, lora_As, lora_Bs = (layers[i : i + n] for i in range(0, 4 * n, n))
        base = (weights, biases, []) if weights[0] is not None else ([], [], biases)
        with below_autograd():
            ys, xa, mask = _op(x, *base, lora_As, lora_Bs, scalings, dropout_p, seed)
        if results is not None:
            results += xa, mask
        ctx.set_materialize_grads(False)
        want_x, want_weights, _, want_As, want_Bs = _split_wanted(ctx)
        has_mask = mask.dim() == 2 and (want_x or any(want_As))
        # Only what a wanted gradient reads is kept alive, x, xa and the mask once for all layers.
        ctx.save_for_backward(
            x if any(want_As) or any(want_weights) else None,
            xa if any(want_Bs) else None,
            mask if has_mask else None,
            *weights,
            *lora_As,
            *lora_Bs,
        )
        ctx.scalings, ctx.dropout_p = scalings, dropout_p
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grad_ys):
        n = len(ctx.scalings)
        x, xa, mask, *layers = ctx.saved_tensors
        weights, lora_As, lora_Bs = (layers[i : i + n] for i in range(0, 3 * n, n))
        has_weights = weights[0] is not None
        want_x, want_weights, want_biases, want_As, want_Bs = _split_wanted(ctx)
        grad_x = None
        grad_weights, grad_biases, grad_As, grad_Bs = ([None] * n for _ in range(4))

        # An output that the loss does not depend on has no gradient: its layer is left out.
        used = [i for i in range(n) if grad_ys[i] is not None and (want_x or want_As[i] or want_Bs[i])]
        if used:
            wanted = want_x, any(want_As[i] for i in used), any(want_Bs[i] for i in used)
            grad_x, used_grad_As, used_grad_Bs = _gradients_of_used(
                ctx, used, grad_ys, x, xa, mask, weights, lora_As, lora_Bs, wanted
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
        return grad_x, *grad_weights, *grad_biases, *grad_As, *grad_Bs, None, None, None, None


def _gradients_of_used(
    ctx, used: list[int], grad_ys, x, xa, mask, weights, lora_As, lora_Bs, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Calls the backward op for the layers with the numbers ``used``: the gradients of x, and of their factors."""
    has_weights = weights[0] is not None
    want_x, want_A, want_B = wanted
    if want_B and torch.is_grad_enabled():
        op = "lora_linear_siblings"
        xa = composite.xa_to_differentiate(op, xa, x, want_x, lora_As, mask, ctx.scalings, ctx.dropout_p)
    if want_B and len(used) < len(grad_ys):
        columns = xa.split([lora_A.shape[0] for lora_A in lora_As], dim=1)
        xa = torch.cat([columns[i] for i in used], dim=1)

    def of_used(entries):
        return [entries[i] for i in used]

    return call_backward(
        _backward_op,
        of_used(grad_ys),
        x if want_A else None,
        of_used(weights) if has_weights else [],
        of_used(lora_As),
        of_used(lora_Bs),
        xa if want_B else None,
        mask,
        of_used(ctx.scalings),
        ctx.dropout_p,
        wanted,
    )


def _split_wanted(ctx) -> tuple[bool, tuple, tuple, tuple, tuple]:
    """Returns which gradients are wanted: of x, and of each layer's weight, bias, lora_A and lora_B."""
    want_x, *layers, _, _, _, _ = ctx.needs_input_grad
    n = len(layers) // 4
    return want_x, layers[:n], layers[n : 2 * n], layers[2 * n : 3 * n], layers[3 * n :]


_op, _backward_op = op_named("lora_linear_siblings"), op_named("lora_linear_siblings_backward")
_lean_apply = lean_apply(_Siblings, num_tensors=-4)


def lora_linear_siblings(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed) -> list[Tensor]:
    """Calls the op for the ys alone; a usual call skips the dispatcher's round through the autograd kernel below."""
    layers = _one_after_the_other(weights, biases, bases, lora_As, lora_Bs, scalings)
    if layers is not None and is_usual_call(x, *layers):
        if any_requires_grad(*lora_As, x, *layers):
            return list(_lean_apply(x, *layers, scalings, dropout_p, seed, None))
        with below_autograd():
            return _op(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)[0]
    return _op(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)[0]


def _one_after_the_other(weights, biases, bases, lora_As, lora_Bs, scalings) -> tuple[Tensor | None, ...] | None:
    """Returns the tensors of the layers as ``_Siblings`` takes them.

    None if the lengths of the lists do not fit: the layers cannot be told apart, and the op refuses them.
    """
    n = len(scalings)
    has_base = len(bases) == n and not (weights or biases) if bases else len(weights) == len(biases) == n
    if not has_base or not n == len(lora_As) == len(lora_Bs) > 0:
        return None
    return (*(weights or [None] * n), *(biases or bases), *lora_As, *lora_Bs)


def _lora_linear_siblings_autograd(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p=0.0, seed=None):
    tensors = (x, *weights, *biases, *bases, *lora_As, *lora_Bs)
    if has_tangent(*tensors):
        return _composite(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)
    layers = _one_after_the_other(weights, biases, bases, lora_As, lora_Bs, scalings)
    if layers is not None and any_requires_grad(*tensors):
        results: list = []
        ys = _Siblings.apply(x, *layers, scalings, dropout_p, seed, results)
        return list(ys), *results
    with below_autograd():
        return _op(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed)


def _num_cast(x, weights, *others) -> int:
    """Without weights the dtype was settled by the base layers, and functional.lora_delta_siblings casts x to it."""
    return 3 if weights else 0


_composite = register_composite("lora_linear_siblings", composite.lora_linear_siblings, _num_cast)
LIBRARY.impl("lora_linear_siblings", _lora_linear_siblings_autograd, "Autograd")
register_backward("lora_linear_siblings_backward", composite.lora_linear_siblings_backward)
register_autocast("lora_linear_siblings", _num_cast)
