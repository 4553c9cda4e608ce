"""The ops in plain PyTorch, with the same dropout masks: for those who look inside an op.

They are the transforms of torch.func (grad, vmap, jvp, jacrev, ...), forward-mode differentiation and gradients of
gradients; :func:`lora_ext._ops.registration.register_composite` says when. Every function takes its op's arguments and
returns its op's results. Sums are in the accumulation dtype, as in the op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._ops.checks import accumulation_dtype, count_tokens
from lora_ext._ops.registration import rows_of
from lora_ext.reference import dropout_threshold, unpack_mask


def _rows(tensor: Tensor) -> Tensor:
    """Flattens the leading dimensions and casts to the accumulation dtype: ``[num_tokens, features]``."""
    return rows_of(tensor).to(accumulation_dtype(tensor.dtype))


def _dropped(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Zeroes what the bit mask drops. A mask without rows, or None, drops nothing."""
    return rows if mask is None or mask.dim() < 2 else rows * unpack_mask(mask, rows.shape[1])


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
    rows = _dropped(_rows(x), mask)
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
    ys = [_rows(grad_y) for grad_y in grad_ys]
    grad_xas = [
        scale(scaling, dropout_p) * (y @ B.to(y.dtype)) for y, B, scaling in zip(ys, lora_Bs, scalings, strict=True)
    ]
    grad_x, grad_As, grad_Bs = None, [], []
    if want_x:
        updates = (grad_xa @ A.to(grad_xa.dtype) for grad_xa, A in zip(grad_xas, lora_As, strict=True))
        total = _dropped(sum(updates), mask)
        for grad_y, weight in zip(grad_ys, weights, strict=True) if weights else ():
            total = total + _rows(grad_y @ weight)
        grad_x = total.reshape(*grad_ys[0].shape[:-1], lora_As[0].shape[1]).to(grad_ys[0].dtype)
    if want_A:
        rows = _dropped(_rows(x), mask)
        grad_As = [(grad_xa.T @ rows).to(A.dtype) for grad_xa, A in zip(grad_xas, lora_As, strict=True)]
    if want_B:
        xas = xa.split([A.shape[0] for A in lora_As], dim=1)
        grad_Bs = [(y.T @ xa).to(B.dtype) for y, xa, B in zip(ys, xas, lora_Bs, strict=True)]
    return grad_x, grad_As, grad_Bs


def largest_rank(lora_As: Sequence[Tensor]) -> int:
    return max(lora_A.shape[-2] for lora_A in lora_As)


# --- groups: one adapter of all groups' ranks, whose xa is zero outside of a row's group ------------------------------
# Unlike in the op, a NaN or an infinity in the factors of any group reaches every row: it is multiplied by zero.


def _stacked_A(lora_As: Sequence[Tensor], rank: int, dtype: torch.dtype) -> Tensor:
    """Pads all matrices to ``rank`` and stacks them: ``[groups * rank, in_features]``."""
    stacks = [A if A.dim() == 3 else A.unsqueeze(0) for A in lora_As]
    return torch.cat([F.pad(A, (0, 0, 0, rank - A.shape[-2])).to(dtype) for A in stacks]).flatten(0, 1)


def _stacked_B(lora_Bs: Sequence[Tensor], rank: int, dtype: torch.dtype) -> Tensor:
    """Pads all matrices to ``rank`` and puts them next to each other: ``[out_features, groups * rank]``."""
    stacks = [B if B.dim() == 3 else B.unsqueeze(0) for B in lora_Bs]
    return torch.cat([F.pad(B, (0, rank - B.shape[-1])).to(dtype) for B in stacks]).permute(1, 0, 2).flatten(1)


def _chosen(num_tokens: int, rank: int, group_of_row: Tensor, scalings: Tensor, ranks: Tensor | None) -> Tensor:
    """Returns where a row's group has ranks, ``[num_tokens, groups, rank]`` as booleans."""
    rows_per_entry = num_tokens // max(group_of_row.numel(), 1)
    group = group_of_row.reshape(-1, 1).expand(-1, rows_per_entry).reshape(-1, 1)
    chosen = (group == torch.arange(scalings.shape[0], device=group.device)).unsqueeze(-1)
    ends = rank if ranks is None else ranks.unsqueeze(-1)
    return chosen & (torch.arange(rank, device=group.device) < ends)


def _scaled(chosen: Tensor, scalings: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """Returns what an all-groups xa is multiplied by: ``[num_tokens, groups * rank]``."""
    return torch.where(chosen, (scalings * scale(1.0, dropout_p)).to(dtype)[:, None], 0.0).flatten(1)


def grouped_xa(x, lora_As, group_of_row, scalings, ranks, mask, dropout_p) -> tuple[Tensor, Tensor]:
    """Computes xa of all groups ``[num_tokens, groups * rank]``, and of each row's group ``[num_tokens, rank]``."""
    rows, rank = _dropped(_rows(x), mask), largest_rank(lora_As)
    chosen = _chosen(count_tokens(x), rank, group_of_row, scalings, ranks)
    xa = (rows @ _stacked_A(lora_As, rank, rows.dtype).T) * _scaled(chosen, scalings, dropout_p, rows.dtype)
    return xa, xa.reshape(chosen.shape).sum(1)


def lora_grouped_(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed):
    mask = draw_mask(x, dropout_p, seed)
    update, xa = _grouped_update(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, mask, dropout_p)
    y += update
    return xa.detach(), mask


def plus_lora_grouped(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks=None):
    """Computes ``lora_grouped_`` out of place, without dropout."""
    return (y + _grouped_update(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, None, 0.0)[0]).to(y.dtype)


def lora_grouped_linear(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks):
    return plus_lora_grouped(F.linear(x, weight, bias), x, lora_As, lora_Bs, group_of_row, scalings, ranks)


def _grouped_update(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, mask, dropout_p) -> tuple[Tensor, Tensor]:
    xa_of_all, xa = grouped_xa(x, lora_As, group_of_row, scalings, ranks, mask, dropout_p)
    return _update(y, xa_of_all, _stacked_B(lora_Bs, xa.shape[1], xa.dtype)), xa


def lora_grouped_backward(grad_y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, xa, mask, dropout_p, output_mask):
    want_x, *wanted = output_mask
    want_As, want_Bs = wanted[: len(lora_As)], wanted[len(lora_As) :]
    mask = mask if dropout_threshold(dropout_p) else None
    rows, rank = _rows(grad_y), largest_rank(lora_As)
    chosen = _chosen(len(rows), rank, group_of_row, scalings, ranks)
    grad_xa = (rows @ _stacked_B(lora_Bs, rank, rows.dtype)) * _scaled(chosen, scalings, dropout_p, rows.dtype)
    grad_x, grad_As, grad_Bs = None, [], []
    if want_x:
        grad_x = _dropped(grad_xa @ _stacked_A(lora_As, rank, rows.dtype), mask).to(grad_y.dtype)
        grad_x = grad_x.reshape(*grad_y.shape[:-1], lora_As[0].shape[-1])
    if any(want_As):
        grad_As = _unstacked((grad_xa.T @ _dropped(_rows(x), mask)).reshape(*chosen.shape[1:], -1), lora_As, want_As)
    if any(want_Bs):
        xa_of_all = torch.where(chosen, xa.unsqueeze(1), 0.0).flatten(1)
        gradient = (rows.T @ xa_of_all).reshape(-1, *chosen.shape[1:]).permute(1, 0, 2)
        grad_Bs = _unstacked(gradient, lora_Bs, want_Bs)
    return grad_x, grad_As, grad_Bs


def _unstacked(gradient: Tensor, factors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Splits ``gradient [groups, ...]`` into those of the wanted entries, without padding."""
    parts = gradient.split([len(factor) if factor.dim() == 3 else 1 for factor in factors])
    return [
        part.narrow(1, 0, factor.shape[-2]).narrow(2, 0, factor.shape[-1]).reshape(factor.shape).to(factor.dtype)
        for part, factor, is_wanted in zip(parts, factors, wanted, strict=True)
        if is_wanted
    ]


def lora_shrink(x, lora_A):
    return _rows(x).matmul(lora_A.to(accumulation_dtype(x.dtype)).T).reshape(*x.shape[:-1], lora_A.shape[0])


def lora_expand(base, xa, lora_B, bias):
    update = _update(base, _rows(xa), lora_B)
    return (base + (update if bias is None else update + bias)).to(base.dtype)


def lora_shrink_backward(grad_xa, x, lora_A, base, output_mask):
    want_x, want_A = output_mask
    rows, grad_x, grad_A = _rows(grad_xa), None, None
    if want_x:
        grad_x = (rows @ lora_A.to(rows.dtype)).reshape(x.shape)
        grad_x = (grad_x if base is None else grad_x + base.reshape(x.shape)).to(x.dtype)
    if want_A:
        grad_A = (rows.T @ _rows(x)).to(lora_A.dtype)
    return grad_x, grad_A


def lora_expand_backward(grad_y, xa, lora_B, output_mask):
    want_xa, want_B = output_mask
    rows, grad_xa, grad_B = _rows(grad_y), None, None
    if want_xa:
        grad_xa = (rows @ lora_B.to(rows.dtype)).reshape(*grad_y.shape[:-1], lora_B.shape[1])
    if want_B:
        grad_B = (rows.T @ _rows(xa)).to(lora_B.dtype)
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
