"""Similarity of two subspaces (section 7.2 and appendix G of the LoRA paper, arXiv 2106.09685), and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext._common.arguments import checked
from lora_ext.analysis.decomposition import check_matrix

# Singular values that rounding of float32 entries can cause, relative to the largest, with some margin. A bound that
# grows with the size of the matrix, as in numpy's matrix_rank, would call all of a bfloat16 matrix rounding.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


@checked
def singular_basis(matrix: Tensor) -> Tensor:
    """Computes the right singular vectors of ``matrix [r, n]``, by descending singular value.

    The paper takes those of ``lora_A``; pass ``lora_B.T`` for the left ones of ``lora_B``. Returns orthonormal columns,
    float64 ``[n, k]``; ``k`` is the :func:`numerical_rank`, so linearly dependent rows add no direction.

    ValueError: it is not a finite matrix.
    """
    check_matrix("singular_basis", "matrix", matrix)
    if not matrix.isfinite().all():
        raise ValueError(f"singular_basis: matrix {list(matrix.shape)} is not finite")
    Q, R = torch.linalg.qr(matrix.double().T)
    U, S, _ = torch.linalg.svd(R)
    return Q @ U[:, : numerical_rank(S)]


@checked
def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Computes the paper's ``phi(i, j) = |first[:, :i].T @ second[:, :j]|_F^2 / min(i, j)`` for all ``i``, ``j``.

    0 means that the subspaces are orthogonal, 1 that the larger contains the smaller. ``first`` has orthonormal columns
    ``[n, i_max]``, the most important first, ``second`` has ``[n, j_max]``. Returns float64 ``[i_max, j_max]``;
    ``phi(i, j)`` is at ``[i - 1, j - 1]``.

    ValueError: their ``n`` differ.
    """
    for name, basis in (("first", first), ("second", second)):
        check_matrix("subspace_similarity", name, basis)
    if len(first) != len(second):
        raise ValueError(f"subspace_similarity: second has {len(second)} rows but first has {len(first)}")
    squares = (first.double().T @ second.double()).square()
    smaller = torch.minimum(*_counts(*squares.shape)).to(squares.device)
    # Rounding can take the sum of squared cosines above the number of directions.
    return (squares.cumsum(0).cumsum(1) / smaller).clamp(max=1.0)


@checked
def expected_random_similarity(i_max: int, j_max: int, dim: int) -> Tensor:
    """Mean of ``phi(i, j)`` between uniformly random subspaces of ``dim`` dimensions: ``max(i, j) / dim``.

    A random direction has ``i / dim`` of its squared norm in any ``i`` dimensions. Gaussian matrices, as in figure 4 of
    the paper, have uniform spans. Returns float64 ``[i_max, j_max]``.
    """
    _check_counts("expected_random_similarity", i_max, j_max, dim)
    return torch.maximum(*_counts(i_max, j_max)) / float(dim)


@checked
def random_similarity_std(i_max: int, j_max: int, dim: int) -> Tensor:
    """Standard deviation of ``phi(i, j)`` between uniformly random subspaces of ``dim`` dimensions.

    It is ``sqrt(2 i (n - i) j (n - j) / (n^2 (n - 1) (n + 2))) / min(i, j)``: float64 ``[i_max, j_max]``.
    """
    _check_counts("random_similarity_std", i_max, j_max, dim)
    i, j = _counts(i_max, j_max)
    n = float(dim)
    variance = 2 * i * (n - i) * j * (n - j) / (n**2 * max(n - 1, 1) * (n + 2))
    return variance.sqrt() / torch.minimum(i, j)


@checked
def orthonormal_columns(dim: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws uniformly random orthonormal columns, float64 ``[dim, count]``, from the QR of a Gaussian matrix.

    QR alone is not uniform; the signs make it so (Mezzadri, arXiv math-ph/0609050).
    """
    if not 0 <= count <= dim:
        raise ValueError(f"orthonormal_columns: count is {count}, want 0 to dim={dim}")
    gaussian = torch.randn(dim, count, dtype=torch.float64, generator=generator, device=generator.device)
    Q, R = torch.linalg.qr(gaussian)
    return Q * R.diagonal().sign()


def _counts(i_max: int, j_max: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(1, i_max + 1, dtype=torch.float64)
    j = torch.arange(1, j_max + 1, dtype=torch.float64)
    return torch.meshgrid(i, j, indexing="ij")


def _check_counts(caller: str, i_max: int, j_max: int, dim: int) -> None:
    for name, count in (("i_max", i_max), ("j_max", j_max)):
        if not 0 <= count <= dim:
            raise ValueError(f"{caller}: {name} is {count}, want 0 to dim={dim}")


# --- how many directions a matrix really has, from its singular values ------------------------------------------------


@checked
def effective_rank(singular_values: Tensor) -> float:
    """``exp`` of the entropy of ``S / sum(S)`` (Roy and Vetterli, 2007, "The effective rank"); 0 for a zero matrix.

    It is 1 for a single direction and ``k`` for ``k`` equal ones. ValueError, here and below: ``singular_values [k]``
    are not finite, at least 0 and in descending order.
    """
    S = _normalised("effective_rank", singular_values)
    if len(S) == 0:
        return 0.0
    return torch.special.entr(S / S.sum()).sum().exp().item()


@checked
def stable_rank(singular_values: Tensor) -> float:
    """``|M|_F^2 / |M|_2^2``: at most the rank, and insensitive to small singular values; 0 for a zero matrix."""
    return _normalised("stable_rank", singular_values).square().sum().item()


@checked
def energy_rank(singular_values: Tensor, energy: float) -> int:
    """The smallest rank that keeps a part ``energy``, in (0, 1], of the squared norm; 0 for a zero matrix."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy_rank: energy is {energy}, want 0 < energy <= 1")
    kept = _normalised("energy_rank", singular_values).square().cumsum(0)
    return int((kept < energy * kept[-1]).sum()) + 1 if len(kept) else 0


@checked
def numerical_rank(singular_values: Tensor) -> int:
    """The number of singular values above 5e-7 of the largest: more than rounding of float32 entries."""
    return int((_normalised("numerical_rank", singular_values) > _ROUNDING).sum())


def _normalised(caller: str, singular_values: Tensor) -> Tensor:
    """Returns the values in float64, divided by the largest; empty for a zero matrix."""
    if singular_values.dim() != 1 or singular_values.is_complex():
        given = f"{singular_values.dtype} {list(singular_values.shape)}"
        raise ValueError(f"{caller}: singular_values is {given}, want a vector of real numbers")
    S = singular_values.double()
    if not (S.isfinite().all() and (S >= 0).all() and (S.diff() <= 0).all()):
        raise ValueError(f"{caller}: singular_values must be finite, at least 0, in descending order; sort them first")
    return S / S[0] if len(S) and S[0] > 0 else S[:0]
