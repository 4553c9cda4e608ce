"""Compares an update with its weight (section 7.3, table 7 of the LoRA paper, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lora_ext._common.arguments import checked
from lora_ext.analysis.decomposition import Svd, block_krylov_svd, check_matrix, frobenius_norm, multiply
from lora_ext.analysis.subspace import numerical_rank, orthonormal_columns


@dataclasses.dataclass(frozen=True)
class ProjectionTable:
    """Norms of the weight ``W`` projected on ``r`` directions: of its update, of ``W`` itself, and random ones."""

    ranks: list[int]  # the values of r: powers of two and the update's rank; empty for a zero update
    delta: list[float]  # |U.T @ W @ V|_F for the update's r leading singular vectors U [out, r] and V [in, r]
    weight: list[float]  # the same for those of W: the maximum over r directions
    random: list[float]  # the same for random orthonormal directions
    random_expected: list[float]  # expected root mean square of random
    amplification: list[float]  # |delta_r|_F / |U.T @ W @ V|_F: the update's r leading parts over the weight there
    delta_norm: float  # |delta W|_F
    weight_norm: float  # |W|_F


@checked
def project(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Computes ``U.T @ weight @ V`` as float64 ``[k, l]``; ``weight [out, in]`` is read once, in any floating dtype.

    ValueError: the shapes of ``U [out, k]`` or ``V [in, l]`` do not fit.
    """
    for name, matrix in (("weight", weight), ("U", U), ("V", V)):
        check_matrix("project", name, matrix)
    if (len(U), len(V)) != tuple(weight.shape):
        raise ValueError(f"project: U {list(U.shape)} and V {list(V.shape)} do not fit the weight {list(weight.shape)}")
    return U.double().T @ multiply(weight, V)


@checked
def projection_table(weight: Tensor, update: Svd, *, seed: int, weight_svd: Svd | None = None) -> ProjectionTable:
    """Compares ``weight [out, in]`` with its update, as table 7 does.

    Args:
        update: of the same shape, from :func:`~lora_ext.analysis.factored_svd`.
        seed: for the random directions and for computing those of the weight.
        weight_svd: the weight's leading directions if known, at least as many as the update has.

    ValueError: the update has another shape, ``weight_svd`` has too few directions, or a value is not finite.
    """
    check_matrix("projection_table", "weight", weight)
    for name, svd in (("update", update), ("weight_svd", weight_svd)):
        if svd is not None and (len(svd.U), len(svd.V)) != tuple(weight.shape):
            shape = [len(svd.U), len(svd.V)]
            raise ValueError(f"projection_table: {name} has shape {shape} but weight has {list(weight.shape)}")
    count = numerical_rank(update.S)
    if weight_svd is not None and len(weight_svd.S) < count:
        given = f"weight_svd has {len(weight_svd.S)} directions"
        raise ValueError(f"projection_table: {given}, want at least the {count} of update")
    delta_norm, weight_norm = torch.linalg.vector_norm(update.S).item(), frobenius_norm(weight)
    if count == 0:
        return ProjectionTable([], [], [], [], [], [], delta_norm, weight_norm)
    if weight_svd is None:
        weight_svd = block_krylov_svd(weight, count, seed=seed)
    out, in_ = weight.shape
    generator = torch.Generator(device=weight.device).manual_seed(int(seed))
    random = orthonormal_columns(out, count, generator), orthonormal_columns(in_, count, generator)
    ranks = leading_ranks(count)
    delta = _leading_norms(project(weight, update.U[:, :count], update.V[:, :count]), ranks)
    sizes = [torch.linalg.vector_norm(update.S[:r]).item() for r in ranks]
    return ProjectionTable(
        ranks,
        delta,
        [torch.linalg.vector_norm(weight_svd.S[:r]).item() for r in ranks],  # W's singular vectors make it diagonal
        _leading_norms(project(weight, *random), ranks),
        [expected_random_norm(weight_norm, out, in_, r) for r in ranks],
        [size / found if found > 0 else math.inf for size, found in zip(sizes, delta, strict=True)],
        delta_norm,
        weight_norm,
    )


@checked
def expected_random_norm(weight_norm: float, out_features: int, in_features: int, r: int) -> float:
    """Root of the mean of ``|U.T @ W @ V|_F^2`` over uniformly random orthonormal ``U [out, r]`` and ``V [in, r]``.

    It is ``r * |W|_F / sqrt(out * in)``: the square is spread evenly over all entries.
    """
    if not 0 <= r <= min(out_features, in_features) or min(out_features, in_features) < 1:
        sizes = f"r is {r}, out_features={out_features}, in_features={in_features}"
        raise ValueError(f"expected_random_norm: {sizes}; want 0 <= r <= the smaller size, and sizes of at least 1")
    return r * weight_norm / math.sqrt(out_features * in_features)


@checked
def leading_ranks(count: int) -> list[int]:
    """Returns the ranks that a table reports: 1, 2, 4, ... and ``count``. ValueError: ``count`` is negative."""
    if count < 0:
        raise ValueError(f"leading_ranks: count is {count}, want at least 0")
    return sorted({2**i for i in range(int(count).bit_length())} | {count}) if count else []


def _leading_norms(projected: Tensor, ranks: list[int]) -> list[float]:
    return [torch.linalg.matrix_norm(projected[:r, :r]).item() for r in ranks]
