"""Measures of how many directions a matrix really has, from its singular values; their scale does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext._common.arguments import checked

# Singular values that rounding of float32 entries can cause, relative to the largest, with some margin. A bound that
# grows with the size of the matrix, as in numpy's matrix_rank, would call all of a bfloat16 matrix rounding.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


@checked
def effective_rank(singular_values: Tensor) -> float:
    """``exp`` of the entropy of ``S / sum(S)`` (Roy and Vetterli, 2007, "The effective rank"); 0 for a zero matrix.

    It is 1 for a single direction and ``k`` for ``k`` equal ones. ValueError: ``singular_values [k]`` are not finite,
    at least 0 and in descending order.
    """
    S = _normalised("effective_rank", singular_values)
    if len(S) == 0:
        return 0.0
    return torch.special.entr(S / S.sum()).sum().exp().item()


@checked
def stable_rank(singular_values: Tensor) -> float:
    """``|M|_F^2 / |M|_2^2``: at most the rank, and insensitive to small singular values; 0 for a zero matrix.

    ValueError: as in :func:`effective_rank`.
    """
    return _normalised("stable_rank", singular_values).square().sum().item()


@checked
def energy_rank(singular_values: Tensor, energy: float) -> int:
    """The smallest rank that keeps a part ``energy``, in (0, 1], of the squared norm; 0 for a zero matrix.

    ValueError: ``energy`` is out of range, or as in :func:`effective_rank`.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy_rank: energy is {energy}, want 0 < energy <= 1")
    kept = _normalised("energy_rank", singular_values).square().cumsum(0)
    return int((kept < energy * kept[-1]).sum()) + 1 if len(kept) else 0


@checked
def numerical_rank(singular_values: Tensor) -> int:
    """The number of singular values above 5e-7 of the largest: more than rounding of float32 entries.

    ValueError: as in :func:`effective_rank`.
    """
    return int((_normalised("numerical_rank", singular_values) > _ROUNDING).sum())


def _normalised(caller: str, singular_values: Tensor) -> Tensor:
    """Returns the values in float64, divided by the largest; empty for a zero matrix."""
    if singular_values.dim() != 1 or singular_values.is_complex():
        raise ValueError(
            f"{caller}: singular_values is {singular_values.dtype} {list(singular_values.shape)}, want a vector of "
            "real numbers"
        )
    S = singular_values.double()
    if not (S.isfinite().all() and (S >= 0).all() and (S.diff() <= 0).all()):
        raise ValueError(f"{caller}: singular_values must be finite, at least 0, in descending order; sort them first")
    return S / S[0] if len(S) and S[0] > 0 else S[:0]
