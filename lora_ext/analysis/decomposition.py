"""Singular value decompositions without a large matrix in full: of an update from its factors, of a weight in part."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._common.arguments import checked
from lora_ext.analysis.row_blocks import check_matrix, frobenius_norm, multiply, multiply_transposed

__all__ = ["Svd", "block_krylov_svd", "factored_svd"]

_EXACT_SIZE = 512  # smaller side, up to which the whole decomposition takes well under a second
_OVERSAMPLING = 8  # directions beyond those asked for, as Halko, Martinsson and Tropp (arXiv 0909.4061) advise
_ITERATIONS = 4


class Svd(NamedTuple):
    """``(U * S) @ V.T``, in float64: ``U [out, k]`` and ``V [in, k]`` of orthonormal columns, ``S [k]`` falling."""

    U: Tensor
    S: Tensor
    V: Tensor


@checked
def factored_svd(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Svd:
    """The decomposition of the update ``scaling * lora_B @ lora_A``, which is never made.

    With ``lora_B = Q_B R_B`` and ``lora_A.T = Q_A R_A`` (QR) it is ``Q_B (scaling * R_B R_A.T) Q_A.T``: an ``[r, r]``
    matrix is decomposed, at a cost of ``(in + out) * r^2``. For a negative scaling the signs are in ``U``.

    Args:
        lora_A: ``[r, in]``, any floating dtype.
        lora_B: ``[out, r]``.

    Returns:
        All ``k = min(r, out, in)`` singular values and their vectors.

    Raises:
        ValueError: the factors do not fit each other, or are not finite.
    """
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_matrix("factored_svd", name, factor)
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"factored_svd: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} have no rank in common"
        )
    if not math.isfinite(scaling):
        raise ValueError(f"factored_svd: scaling is {scaling}, want a finite number")
    if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise ValueError("factored_svd: lora_A or lora_B is not finite")
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    U, S, Vh = torch.linalg.svd(float(scaling) * R_B @ R_A.T, full_matrices=False)
    return Svd(Q_B @ U, S, Q_A @ Vh.T)


@checked
def block_krylov_svd(weight: Tensor, rank: int, *, seed: int) -> Svd:
    """The ``rank`` leading singular values of ``weight [out, in]`` and their vectors.

    A weight whose smaller side is at most 512 is decomposed in full. Of a larger one the block Krylov method (Musco and
    Musco, arXiv 1504.05477, algorithm 2) finds them from nine products of the weight with ``rank + 8`` vectors. Where
    singular values fall slowly, as those of trained weights do, it comes closer than the randomised method of as many
    products. No copy of the weight is made in another dtype.

    Args:
        weight: any floating dtype.
        rank: 1 to the smaller side.
        seed: of the vectors that it begins with; the default generator is left alone.

    Returns:
        Values that are at most the true ones, and nearly these. Vectors near the ``rank``-th are mixed where its value
        and the next are nearly equal.

    Raises:
        ValueError: the weight is no finite matrix, or has not so many singular values.
    """
    check_matrix("block_krylov_svd", "weight", weight)
    if not math.isfinite(frobenius_norm(weight)):
        raise ValueError(f"block_krylov_svd: weight {list(weight.shape)} is not finite")
    small = min(weight.shape)
    if not 1 <= rank <= small:
        raise ValueError(
            f"block_krylov_svd: rank is {rank}, want 1 to {small}, the smaller side of {list(weight.shape)}"
        )
    width = rank + _OVERSAMPLING
    if small <= max(_EXACT_SIZE, width * (_ITERATIONS + 1)):
        return _exact(weight.double(), rank)
    generator = torch.Generator(device=weight.device).manual_seed(int(seed))
    start = torch.randn(weight.shape[1], width, dtype=torch.float64, generator=generator, device=weight.device)
    basis = torch.linalg.qr(start).Q
    images = multiply(weight, basis)
    for _ in range(_ITERATIONS):
        following = multiply_transposed(weight, images[:, -width:])
        # Householder's Q is orthonormal even where the weight's rank is used up, and leaves the columns that are so be.
        last = torch.linalg.qr(torch.cat([basis, following], 1)).Q[:, -width:]
        basis = torch.cat([basis, last], 1)
        images = torch.cat([images, multiply(weight, last)], 1)
    U, S, V = _exact(images, rank)
    return Svd(U, S, basis @ V)


def _exact(matrix: Tensor, rank: int) -> Svd:
    """The whole decomposition, cut to ``rank``; a QR decomposition first makes it a square one of the smaller side."""
    if matrix.shape[0] < matrix.shape[1]:
        U, S, V = _exact(matrix.T, rank)
        return Svd(V, S, U)
    Q, R = torch.linalg.qr(matrix)
    U, S, Vh = torch.linalg.svd(R)
    return Svd(Q @ U[:, :rank], S[:rank], Vh[:rank].T)
