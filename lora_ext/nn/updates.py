"""Updates of a layer's output: several active adapters as one, and their sum with the output in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._ops.plain import rows_of


class Update(NamedTuple):
    """The low-rank update that an op adds to a layer's output: ``scaling * dropout(x) @ lora_A.T @ lora_B.T``."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float


def joined(updates: Sequence[Update], rank_dim: int = 0) -> list[Update]:
    """Concatenates the ranks of updates that one op can compute, so that the output is read and rounded once for all.

    These have one dropout probability, and factors of one dtype on one device; they then share a dropout mask. If
    scalings differ, their ratios are multiplied into ``lora_B``; 16-bit factors would be rounded by that, and are
    joined only where scalings are equal. Gradients flow to each adapter's factors. An update that no other goes with
    is returned as it is.

    Args:
        updates: ``lora_B`` is ``[out_features, r, ...]``.
        rank_dim: the dimension of the ranks in ``lora_A``, which may also be a tensor made from it.

    Returns:
        One update for each kind, in the order of the first of each.
    """
    if len(updates) < 2:
        return list(updates)
    kinds: dict[tuple, list[Update]] = {}
    for update in updates:
        dtype = update.lora_B.dtype
        kind = update.dropout_p, dtype, update.lora_B.device, update.scaling if dtype.itemsize < 4 else None
        kinds.setdefault(kind, []).append(update)
    return [_concatenated(alike, rank_dim) for alike in kinds.values()]


def _concatenated(updates: list[Update], rank_dim: int) -> Update:
    if len(updates) == 1:
        return updates[0]
    scaling = max(abs(update.scaling) for update in updates)
    lora_Bs = [u.lora_B if u.scaling == scaling else u.lora_B * (u.scaling / scaling) for u in updates]
    lora_A = torch.cat([update.lora_A for update in updates], rank_dim)
    return Update(lora_A, torch.cat(lora_Bs, 1), scaling, updates[0].dropout_p)


def sum_of_biases(bias: Tensor | None, scaled: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Adds the scaled biases of adapters to ``bias``, out of place; the sum is rounded to ``dtype`` once."""
    total = bias
    for update in scaled:
        total = update if total is None else total + update
    return bias if total is bias else total.to(dtype)


def expand_onto(
    y: Tensor, xa: Tensor, lora_B: Tensor, scaling: float, dim: int = -1, *, may_change: bool = False
) -> Tensor:
    """Returns ``y + scaling * xa @ lora_B.T`` along ``dim``, in the dtype of ``y``; the sum is rounded once.

    For layers whose xa is not made by our kernels: embeddings, convolutions, layers that are split over devices.

    Args:
        y: ``[..., out_features]``, or ``[batch, out_features, *spatial]`` with ``dim=1``.
        xa: like ``y``, with ``r`` instead of ``out_features``. If ``y`` has 16 bits and the factors are float32, the
            product is in float32.
        lora_B: ``[out_features, r]``, dtype of ``xa``.
        scaling: the factor of the update.
        dim: the dimension of the features, -1 or 1.
        may_change: whether ``y`` may be overwritten.
    """
    if y.is_nested:
        return (y + scaling * (xa @ lora_B.T)).to(y.dtype)
    acc, Y = torch.promote_types(y.dtype, xa.dtype), y.movedim(dim, -1)
    xa, lora_B = xa.to(acc), lora_B.to(acc)
    addmm, baddbmm = (Tensor.addmm_, Tensor.baddbmm_) if may_change else (Tensor.addmm, Tensor.baddbmm)
    with _without_autocast(y.device.type):  # autocast would round y as well
        if dim == -1 or (Y.is_contiguous() and not y.is_contiguous()):  # features are last in memory
            total = addmm(rows_of(Y).to(acc), rows_of(xa.movedim(dim, -1)), lora_B.T, alpha=scaling)
            return total.view(Y.shape).movedim(-1, dim).to(y.dtype)
        batched = lora_B.expand(y.shape[0], *lora_B.shape)  # len() would fix the size in an exported program
        total = baddbmm(y.flatten(dim + 1).to(acc), batched, xa.flatten(dim + 1), alpha=scaling)
        return total.view(y.shape).to(y.dtype)


def _without_autocast(device: str) -> AbstractContextManager:
    """Disables autocast; the meta device, on which memory is planned, has none.

    torch 2.11 does not trace ``torch.amp.is_autocast_available``.
    """
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
