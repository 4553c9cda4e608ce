"""Tensors whose memory holds other values than they have: PyTorch negates, conjugates or clears when it reads them.

Kernels read the memory. PyTorch's own fallbacks resolve such arguments, except those in a list of optional tensors; and
where an op changes one, they change a copy and then fail.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_not_lazy(op: str, label: str, tensor: Tensor) -> None:
    """ValueError for a tensor that an op would change, where its memory holds other values than it has."""
    if tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor():
        raise ValueError(f"{op}: {label} is a lazy view, whose memory holds other values; pass {label}.clone()")


def resolved(argument: object) -> object:
    """An argument of an op, whose tensors' memory holds their values."""
    if isinstance(argument, (list, tuple)):
        return [resolved(entry) for entry in argument]
    if not isinstance(argument, Tensor):
        return argument
    if argument._is_zerotensor():
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    return argument.resolve_neg().resolve_conj()
