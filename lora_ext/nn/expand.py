"""Adds an up-projection to a base layer's output in plain PyTorch.

For layers whose xa is not made by our kernels: embeddings, convolutions, layers that are split over devices.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_ext._ops.registration import rows_of


def expand_onto(
    y: Tensor, xa: Tensor, lora_B: Tensor, scaling: float, dim: int = -1, *, may_change: bool = False
) -> Tensor:
    """Returns ``y + scaling * xa @ lora_B.T`` along ``dim``, in the dtype of ``y``; the sum is rounded once.

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
    """Disables autocast; the meta device, on which memory is planned, has none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
