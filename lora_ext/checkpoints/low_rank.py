"""The best low-rank approximation of a matrix, and its error at each rank."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

_EXACT_SIZE = 512  # up to this size the full decomposition takes well under a second
_ITERATIONS = 4  # slowly falling singular values, as after fine-tuning, need more than one subspace iteration


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The error of an approximation."""

    r: int  # rank of the factors
    norm: float  # Frobenius norm of the matrix
    errors: dict[int, float]  # rank (1, 2, 4, ..., r) -> norm of the remainder over the matrix's norm


def approximate(delta: Tensor, rank: int, energy: float | None = None) -> tuple[Tensor, Tensor, LayerError]:
    """Computes a truncated singular value decomposition of ``delta [out, in]``, and overwrites it by the remainder.

    Small matrices are decomposed in full, larger ones by a randomised method (Halko, Martinsson, Tropp, arXiv
    0909.4061, algorithm 4.4): with twice as many vectors as the rank, the error is within 1 % of the best one.

    Args:
        rank: largest rank; the smaller side of the matrix is a limit too.
        energy: take the smallest rank up to ``rank`` that leaves at most ``1 - energy`` of the squared norm.

    Returns:
        ``lora_A [r, in]`` and ``lora_B [out, r]``, each with the roots of the singular values, and the error.
    """
    small = min(delta.shape)
    rank = min(rank, small)
    norm = torch.linalg.vector_norm(delta, dtype=torch.float64).item()
    vectors = 2 * max(rank, 8)
    if small <= max(_EXACT_SIZE, 2 * vectors):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that the same files give the same adapter
            U, S, V = torch.svd_lowrank(delta, q=vectors, niter=_ITERATIONS)
        Vh = V.T
    if energy is not None and norm > 0:
        kept = (S.double() ** 2).cumsum(0) / norm**2
        rank = min(rank, int((kept < energy).sum()) + 1)
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    # Norms of the actual remainder: differences of squares would lose remainders that are small next to the norm.
    errors, done = {}, 0
    for r in sorted({2**i for i in range(rank.bit_length()) if 2**i <= rank} | {rank}):
        delta.addmm_(B[:, done:r], A[done:r], alpha=-1)
        done = r
        remaining = torch.linalg.vector_norm(delta, dtype=torch.float64).item()
        errors[r] = remaining / norm if norm > 0 else 0.0
    return A.contiguous(), B.contiguous(), LayerError(len(A), norm, errors)
