"""How many directions a matrix really has, by its singular values: several answers to one question.

Each function takes singular values ``[k]`` in falling order, and knows no scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_rank", "energy_rank", "numerical_rank", "stable_rank"]

# Singular values that the rounding of float32 entries alone can make, relative to the largest, with some room. Counting
# from the size of the matrix, as numpy's matrix_rank does, would call all of a bfloat16 matrix rounding.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


def effective_rank(singular_values: Tensor) -> float:
    """``exp`` of the entropy of ``S / sum(S)`` (Roy and Vetterli, 2007, "The effective rank"); 0 for a zero matrix.

    Between 1, for a single direction, and ``k``, for directions of equal weight.
    """
    S = _normalised(singular_values)
    if len(S) == 0:
        return 0.0
    return torch.special.entr(S / S.sum()).sum().exp().item()


def stable_rank(singular_values: Tensor) -> float:
    """``|M|_F^2 / |M|_2^2``, at most the rank and not moved by what is small; 0 for a zero matrix."""
    return _normalised(singular_values).square().sum().item()


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """The smallest rank that keeps ``energy``, in (0, 1], as a part of the squared norm; 0 for a zero matrix."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy_rank: energy is {energy}, want 0 < energy <= 1")
    kept = _normalised(singular_values).square().cumsum(0)
    return int((kept < energy * kept[-1]).sum()) + 1 if len(kept) else 0


def numerical_rank(singular_values: Tensor) -> int:
    """The number of singular values that are more than rounding of float32 entries: above 5e-7 of the largest."""
    return int((_normalised(singular_values) > _ROUNDING).sum())


def _normalised(singular_values: Tensor) -> Tensor:
    """In float64, the largest 1; empty for a zero matrix."""
    S = singular_values.double()
    return S / S[0] if len(S) and S[0] > 0 else S[:0]
