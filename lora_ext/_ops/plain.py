"""The ops in plain PyTorch, with the same dropout masks: for those who look inside an op.

They are the transforms of torch.func (grad, vmap, jvp, jacrev, ...), forward-mode differentiation and gradients of
gradients (registration.py); and CUDA in float32 and float64 (csrc/bindings/plain_op.h). Every function that is named
after an op takes its arguments and returns its results. Sums are in the accumulation dtype, as in the op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._ops.checks import accumulation_dtype, count_tokens
from lora_ext.reference import dropout_threshold, unpack_mask

_CACHED = 2**17  # elements whose copy in another dtype stays in a core's cache


def rows_of(tensor: Tensor) -> Tensor:
    """Flattens the leading dimensions: ``[num_tokens, features]``. ``flatten`` has no rule for ``is_grads_batched``."""
    return tensor.reshape(count_tokens(tensor), tensor.shape[-1])


def weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """Computes the gradient of a plain linear layer's weight, for users who unfreeze it; LoRA does not need it."""
    return rows_of(grad_y).T @ rows_of(x)


def bias_gradient(grad_y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Computes a bias's gradient in ``dtype``; None: that of ``grad_y``. Sums in float32 (float64) in any case."""
    dtype = dtype or grad_y.dtype
    rows = rows_of(grad_y)
    wide = torch.promote_types(rows.dtype, dtype)
    if rows.device.type != "cpu" or rows.dtype == wide or rows.numel() <= _CACHED:
        return rows.sum(0, dtype=wide).to(dtype)
    # PyTorch's CPU kernel first copies its argument to the dtype of the result; of the whole tensor, 4 times as slow.
    return sum(part.sum(0, dtype=wide) for part in rows.split(max(1, _CACHED // rows.shape[1]))).to(dtype)


def acc_rows(tensor: Tensor) -> Tensor:
    """Flattens the leading dimensions and casts to the accumulation dtype: ``[num_tokens, features]``."""
    return rows_of(tensor).to(accumulation_dtype(tensor.dtype))


def dropped_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Zeroes what the bit mask drops, NaN too. A mask without rows, or None, drops nothing."""
    return rows if mask is None or mask.dim() < 2 else torch.where(unpack_mask(mask, rows.shape[1]), rows, 0.0)


def scale(scaling: float, dropout_p: float) -> float:
    return scaling * (65536.0 / (65536.0 - dropout_threshold(dropout_p)))


def dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Zeroes what the seed's mask drops; without the factor, which is in :func:`scale`."""
    mask = draw_mask(x, dropout_p, seed)
    return x if mask.dim() < 2 else x * unpack_mask(mask, x.shape[-1]).reshape(x.shape)


def dropped_part(
    part: Tensor, dropout_p: float, seed: Tensor | None, whole: Sequence[int], begin: Sequence[int]
) -> Tensor:
    """Returns the part of :func:`dropped` that begins at index ``begin`` of a tensor of shape ``whole``."""
    if dropout_threshold(dropout_p) == 0:
        return part
    tokens, (features, first) = math.prod(whole[:-1]), (whole[-1], begin[-1])
    mask = torch.ops.lora_ext.lora_dropout_mask.default(seed, tokens, features, dropout_p)
    mask = mask.reshape(*whole[:-1], mask.shape[-1])  # a bit for each feature
    for dim, start in enumerate(begin[:-1]):
        mask = mask.narrow(dim, start, part.shape[dim])
    end = first + part.shape[-1]
    bits = unpack_mask(mask[..., first // 8 : -(-end // 8)].flatten(0, -2), end - first // 8 * 8)
    return part * bits[:, first % 8 :].reshape(part.shape)


def draw_mask(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_threshold(dropout_p) == 0:
        return x.new_empty(0, dtype=torch.uint8)
    return torch.ops.lora_ext.lora_dropout_mask.default(seed, count_tokens(x), x.shape[-1], dropout_p)


def xa_of(x: Tensor, lora_A: Tensor, mask: Tensor | None, scaling: float, dropout_p: float) -> Tensor:
    """Computes xa as the forwards do: ``[num_tokens, r]``, with the scaling."""
    rows = dropped_rows(acc_rows(x), mask)
    return scale(scaling, dropout_p) * (rows @ lora_A.to(rows.dtype).T)


def _update(y: Tensor, xa: Tensor, lora_B: Tensor) -> Tensor:
    return (xa @ lora_B.to(xa.dtype).T).reshape(y.shape)


def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    (y,), xa, mask = lora_linear_siblings(x, [weight], [bias], [], [lora_A], [lora_B], [scaling], dropout_p, seed)
    return y, xa, mask


def lora_linear_siblings(x, weights, biases, bases, lora_As, lora_Bs, scalings, dropout_p, seed):
    bases = bases or [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    mask = draw_mask(x, dropout_p, seed)
    xas = [xa_of(x, A, mask, scaling, dropout_p) for A, scaling in zip(lora_As, scalings, strict=True)]
    ys = [(y + _update(y, xa, B)).to(y.dtype) for y, xa, B in zip(bases, xas, lora_Bs, strict=True)]
    return ys, torch.cat(xas, dim=1).detach(), mask


def lora_delta_(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    mask = draw_mask(x, dropout_p, seed)
    xa = xa_of(x, lora_A, mask, scaling, dropout_p)
    y += _update(y, xa, lora_B)
    return xa.detach(), mask


def lora_linear_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask):
    weights = [] if weight is None else [weight]
    grad_x, *grads = lora_linear_siblings_backward(
        [grad_y], x, weights, [lora_A], [lora_B], xa, mask, [scaling], dropout_p, output_mask
    )
    return grad_x, *((grad[0] if grad else None) for grad in grads)


def lora_linear_siblings_backward(grad_ys, x, weights, lora_As, lora_Bs, xa, mask, scalings, dropout_p, output_mask):
    want_x, want_A, want_B = output_mask
    mask = mask if dropout_threshold(dropout_p) else None
    ys = [acc_rows(grad_y) for grad_y in grad_ys]
    grad_xas = [
        scale(scaling, dropout_p) * (y @ B.to(y.dtype)) for y, B, scaling in zip(ys, lora_Bs, scalings, strict=True)
    ]
    grad_x, grad_As, grad_Bs = None, [], []
    if want_x:
        updates = (grad_xa @ A.to(grad_xa.dtype) for grad_xa, A in zip(grad_xas, lora_As, strict=True))
        total = dropped_rows(sum(updates), mask)
        for grad_y, weight in zip(grad_ys, weights, strict=True) if weights else ():
            total = total + acc_rows(grad_y @ weight)
        grad_x = total.reshape(*grad_ys[0].shape[:-1], lora_As[0].shape[1]).to(grad_ys[0].dtype)
    if want_A:
        rows = dropped_rows(acc_rows(x), mask)
        grad_As = [(grad_xa.T @ rows).to(A.dtype) for grad_xa, A in zip(grad_xas, lora_As, strict=True)]
    if want_B:
        xas = xa.split([A.shape[0] for A in lora_As], dim=1)
        grad_Bs = [(y.T @ xa).to(B.dtype) for y, xa, B in zip(ys, xas, lora_Bs, strict=True)]
    return grad_x, grad_As, grad_Bs


def largest_rank(lora_As: Sequence[Tensor]) -> int:
    return max(lora_A.shape[-2] for lora_A in lora_As)


def lora_shrink(x, lora_A):
    return acc_rows(x).matmul(lora_A.to(accumulation_dtype(x.dtype)).T).reshape(*x.shape[:-1], lora_A.shape[0])


def lora_expand(base, xa, lora_B, bias):
    update = _update(base, acc_rows(xa), lora_B)
    return (base + (update if bias is None else update + bias)).to(base.dtype)


def lora_shrink_backward(grad_xa, x, lora_A, base, output_mask):
    want_x, want_A = output_mask
    rows, grad_x, grad_A = acc_rows(grad_xa), None, None
    if want_x:
        grad_x = (rows @ lora_A.to(rows.dtype)).reshape(x.shape)
        grad_x = (grad_x if base is None else grad_x + base.reshape(x.shape)).to(x.dtype)
    if want_A:
        grad_A = (rows.T @ acc_rows(x)).to(lora_A.dtype)
    return grad_x, grad_A


def lora_expand_backward(grad_y, xa, lora_B, output_mask):
    want_xa, want_B = output_mask
    rows, grad_xa, grad_B = acc_rows(grad_y), None, None
    if want_xa:
        grad_xa = (rows @ lora_B.to(rows.dtype)).reshape(*grad_y.shape[:-1], lora_B.shape[1])
    if want_B:
        grad_B = (rows.T @ acc_rows(xa)).to(lora_B.dtype)
    return grad_xa, grad_B


def xa_to_differentiate(
    op: str,
    xa: Tensor,
    x: Tensor | None,
    want_x: bool,
    lora_As: Sequence[Tensor],
    mask: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
) -> Tensor:
    """Returns the saved xa as a function of ``x`` and ``lora_As``, for a gradient's gradient.

    Raises:
        RuntimeError: ``x`` is wanted but was not kept, because every lora_A is frozen.
    """
    if x is not None:
        return torch.cat(
            [xa_of(x, A, mask, scaling, dropout_p) for A, scaling in zip(lora_As, scalings, strict=True)], 1
        )
    check_x_is_kept(op, want_x)
    return xa


def check_x_is_kept(op: str, want_x: bool) -> None:
    """Raises RuntimeError if the gradient of a gradient needs x, which a forward with a frozen lora_A did not keep."""
    if want_x:
        raise RuntimeError(
            f"{op}: gradients of gradients (create_graph=True) need x, which is not kept while lora_A is frozen; "
            "call lora_A.requires_grad_() before the forward"
        )
