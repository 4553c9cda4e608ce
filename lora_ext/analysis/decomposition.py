"""Singular value decompositions: of an update from its factors, of a large weight in part.

A large weight is multiplied with a few vectors by blocks of rows, so that it is never converted whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._common.arguments import checked
from lora_ext._ops import checks
from lora_ext._ops.checks import accumulation_dtype, check_tensors

_EXACT_SIZE = 512  # smaller side; up to this a full decomposition takes well under a second
_OVERSAMPLING = 8  # extra directions, as Halko, Martinsson and Tropp (arXiv 0909.4061) advise
_ITERATIONS = 4
# 2 MB in float32: converted values are still in the thread's cache when they are multiplied, which halves the time.
# A block has this many elements per thread, so that more threads do not synchronise more often.
ELEMENTS_PER_THREAD = 512 << 10


class Svd(NamedTuple):
    """``(U * S) @ V.T`` in float64: orthonormal columns ``U [out, k]`` and ``V [in, k]``, descending ``S [k]``."""

    U: Tensor
    S: Tensor
    V: Tensor


@checked
def factored_svd(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Svd:
    """Decomposes the update ``scaling * lora_B @ lora_A`` without computing the product.

    With ``lora_B = Q_B R_B`` and ``lora_A.T = Q_A R_A`` (QR) the update is ``Q_B (scaling * R_B R_A.T) Q_A.T``, so only
    an ``[r, r]`` matrix is decomposed: cost ``(in + out) * r^2``. A negative scaling flips signs in ``U``.

    ``lora_A`` is ``[r, in]``, ``lora_B`` is ``[out, r]``, both of any floating dtype. Returns all
    ``k = min(r, out, in)`` singular values and their vectors.

    ValueError: the factors do not fit each other, or are not finite.
    """
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_matrix("factored_svd", name, factor)
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(f"factored_svd: lora_B has rank {lora_B.shape[1]} but lora_A has {lora_A.shape[0]}")
    if not (math.isfinite(scaling) and lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise ValueError(f"factored_svd: lora_A, lora_B or scaling {scaling} is not finite")
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    U, S, Vh = torch.linalg.svd(float(scaling) * R_B @ R_A.T, full_matrices=False)
    return Svd(Q_B @ U, S, Q_A @ Vh.T)


@checked
def block_krylov_svd(weight: Tensor, rank: int, *, seed: int) -> Svd:
    """Computes the ``rank`` leading singular values of ``weight [out, in]`` and their vectors.

    A weight whose smaller side is at most 512 is decomposed in full. For larger ones the block Krylov method (Musco and
    Musco, arXiv 1504.05477, algorithm 2) needs nine products of the weight with ``rank + 8`` vectors. When singular
    values fall slowly, as in trained weights, it is more accurate than the randomised method with as many products.
    ``seed`` is for the starting vectors; the default generator is not used.

    The values are at most the true ones, and close to them. When the ``rank``-th value and the next are nearly equal,
    the last vectors are mixed.

    ValueError: the weight is not a finite matrix, or has fewer than ``rank`` singular values.
    """
    check_matrix("block_krylov_svd", "weight", weight)
    if not math.isfinite(frobenius_norm(weight)):
        raise ValueError(f"block_krylov_svd: weight {list(weight.shape)} is not finite")
    small = min(weight.shape)
    if not 1 <= rank <= small:
        raise ValueError(f"block_krylov_svd: rank is {rank}, want 1 to {small}, the smaller side of the weight")
    width = rank + _OVERSAMPLING
    if small <= max(_EXACT_SIZE, width * (_ITERATIONS + 1)):
        return _exact(weight.double(), rank)
    generator = torch.Generator(device=weight.device).manual_seed(int(seed))
    start = torch.randn(weight.shape[1], width, dtype=torch.float64, generator=generator, device=weight.device)
    basis = torch.linalg.qr(start).Q
    images = multiply(weight, basis)
    for _ in range(_ITERATIONS):
        following = multiply_transposed(weight, images[:, -width:])
        # Householder's Q is orthonormal even after the rank is exhausted, and keeps columns that already are.
        last = torch.linalg.qr(torch.cat([basis, following], 1)).Q[:, -width:]
        basis = torch.cat([basis, last], 1)
        images = torch.cat([images, multiply(weight, last)], 1)
    U, S, V = _exact(images, rank)
    return Svd(U, S, basis @ V)


def _exact(matrix: Tensor, rank: int) -> Svd:
    """Decomposes in full and keeps ``rank`` directions; QR first reduces the matrix to a square of the smaller side."""
    if matrix.shape[0] < matrix.shape[1]:
        U, S, V = _exact(matrix.T, rank)
        return Svd(V, S, U)
    Q, R = torch.linalg.qr(matrix)
    U, S, Vh = torch.linalg.svd(R)
    return Svd(Q @ U[:, :rank], S[:rank], Vh[:rank].T)


def check_matrix(caller: str, name: str, matrix: Tensor) -> None:
    """Raises TypeError or ValueError unless it is a dense matrix of a supported floating dtype with values."""
    check_tensors(caller, {name: matrix})
    checks.check_matrix(caller, name, matrix)
    if matrix.is_meta:
        raise ValueError(f"{caller}: {name} is on the meta device, where it has no values")


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Computes ``matrix @ vectors`` as float64 ``[rows, k]``; the products are float32, of a float64 matrix float64."""
    vectors = vectors.to(accumulation_dtype(matrix.dtype))
    return torch.cat([(block @ vectors).double() for _, block in _blocks(matrix)])


def multiply_transposed(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Computes ``matrix.T @ vectors`` as float64 ``[cols, k]``, like :func:`multiply`; blocks are summed in float64."""
    vectors = vectors.to(accumulation_dtype(matrix.dtype))
    total = torch.zeros(vectors.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for begin, block in _blocks(matrix):
        total += vectors[begin : begin + len(block)].T @ block
    return total.T


def frobenius_norm(matrix: Tensor) -> float:
    """Frobenius norm of a matrix of any floating dtype, computed in float64."""
    norms = (torch.linalg.vector_norm(block, dtype=torch.float64).item() for _, block in _blocks(matrix))
    return math.hypot(*norms)


def _blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields ``(first row, rows)``, the rows in the accumulation dtype."""
    height = max(ELEMENTS_PER_THREAD * torch.get_num_threads() // max(matrix.shape[1], 1), 1)
    for begin in range(0, len(matrix), height):
        yield begin, matrix[begin : begin + height].to(accumulation_dtype(matrix.dtype))
