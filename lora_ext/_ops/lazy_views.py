"""Lazy views: tensors whose memory holds other values, which PyTorch negates, conjugates or clears when it reads them.

Kernels read the memory. PyTorch's fallbacks resolve such arguments, except those in a list of optional tensors; if an
op changes one, they change a copy and then fail.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_not_lazy(op: str, label: str, tensor: Tensor) -> None:
    """Raises ValueError if a tensor that an op would change is a lazy view."""
    if tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor():
        raise ValueError(f"{op}: {label} is a lazy view, whose memory holds other values; pass {label}.clone()")


def resolved(op: str, label: str, argument: object) -> object:
    """Resolves the lazy views in an argument. Raises RuntimeError if PyTorch cannot compute one."""
    if isinstance(argument, (list, tuple)):
        return [resolved(op, f"{label}[{i}]", entry) for i, entry in enumerate(argument)]
    if not isinstance(argument, Tensor):
        return argument
    if argument._is_zerotensor():
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    if argument.is_quantized:  # PyTorch's own negation of one crashes
        raise RuntimeError(f"{op}: {label} is a lazy view of a quantized tensor; pass {label}.dequantize()")
    try:
        return argument.resolve_neg().resolve_conj()
    except RuntimeError as error:  # of a dtype that PyTorch does not negate
        raise RuntimeError(f"{op}: {label} is a lazy view that PyTorch cannot compute: {error}") from error
