"""How an update lies to the weight that it changes (section 7.3, table 7 of the LoRA paper, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lora_ext._common.arguments import checked
from lora_ext.analysis.decomposition import Svd, block_krylov_svd
from lora_ext.analysis.row_blocks import check_matrix, frobenius_norm, multiply
from lora_ext.analysis.spectrum import numerical_rank
from lora_ext.analysis.subspace import orthonormal_columns

__all__ = ["ProjectionTable", "expected_random_norm", "leading_ranks", "project", "projection_table"]


@dataclasses.dataclass(frozen=True)
class ProjectionTable:
    """The weight ``W`` in the leading directions of its update, in its own and in random ones, by their number ``r``.

    Attributes:
        ranks: the numbers of directions: powers of two, and all that the update has; empty for a zero update.
        delta: ``|U.T @ W @ V|_F`` for the update's ``r`` leading singular vectors ``U [out, r]`` and ``V [in, r]``.
        weight: the same for those of ``W``: the most that ``r`` directions can hold.
        random: the same for random orthonormal ones.
        random_expected: the root of the mean square of ``random``.
        amplification: ``|delta_r|_F / |U.T @ W @ V|_F``, the norm of the update's ``r`` leading parts against what the
            weight has in their directions.
        delta_norm: ``|delta W|_F``.
        weight_norm: ``|W|_F``.
    """

    ranks: list[int]
    delta: list[float]
    weight: list[float]
    random: list[float]
    random_expected: list[float]
    amplification: list[float]
    delta_norm: float
    weight_norm: float


@checked
def project(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """``U.T @ weight @ V``: float64 ``[k, l]`` of ``weight [out, in]`` in any floating dtype, read once by rows.

    Args:
        U: ``[out, k]``.
        V: ``[in, l]``.

    Raises:
        ValueError: their shapes do not fit.
    """
    for name, matrix in (("weight", weight), ("U", U), ("V", V)):
        check_matrix("project", name, matrix)
    if (len(U), len(V)) != tuple(weight.shape):
        raise ValueError(f"project: U {list(U.shape)} and V {list(V.shape)} do not fit the weight {list(weight.shape)}")
    return U.double().T @ multiply(weight, V)


@checked
def projection_table(weight: Tensor, update: Svd, *, seed: int, own: Svd | None = None) -> ProjectionTable:
    """Compares ``weight [out, in]`` with an update of it, as table 7 does.

    Args:
        weight: any floating dtype.
        update: of the same shape, from :func:`~lora_ext.analysis.factored_svd`.
        seed: of the random directions, and of finding the weight's own.
        own: the weight's leading directions where they are known, at least as many as the update has;
            :func:`~lora_ext.analysis.block_krylov_svd` finds them otherwise.

    Raises:
        ValueError: the update is of another shape, the weight's directions are too few, or something is not finite.
    """
    check_matrix("projection_table", "weight", weight)
    for name, svd in (("update", update), ("own", own)):
        if svd is not None and (len(svd.U), len(svd.V)) != tuple(weight.shape):
            shape = [len(svd.U), len(svd.V)]
            raise ValueError(f"projection_table: {name} is of shape {shape}, but weight is {list(weight.shape)}")
    count = numerical_rank(update.S)
    if own is not None and len(own.S) < count:
        raise ValueError(f"projection_table: own has {len(own.S)} directions, want {count}, as many as update has")
    delta_norm, weight_norm = torch.linalg.vector_norm(update.S).item(), frobenius_norm(weight)
    if count == 0:
        return ProjectionTable([], [], [], [], [], [], delta_norm, weight_norm)
    if own is None:
        own = block_krylov_svd(weight, count, seed=seed)
    out, in_ = weight.shape
    generator = torch.Generator(device=weight.device).manual_seed(int(seed))
    random = orthonormal_columns(out, count, generator), orthonormal_columns(in_, count, generator)
    ranks = leading_ranks(count)
    delta = _leading_norms(project(weight, update.U[:, :count], update.V[:, :count]), ranks)
    sizes = [torch.linalg.vector_norm(update.S[:r]).item() for r in ranks]
    return ProjectionTable(
        ranks,
        delta,
        [torch.linalg.vector_norm(own.S[:r]).item() for r in ranks],  # W's singular vectors make it diagonal
        _leading_norms(project(weight, *random), ranks),
        [expected_random_norm(weight_norm, out, in_, r) for r in ranks],
        [size / found if found > 0 else math.inf for size, found in zip(sizes, delta, strict=True)],
        delta_norm,
        weight_norm,
    )


@checked
def expected_random_norm(weight_norm: float, out_features: int, in_features: int, r: int) -> float:
    """The root of the mean of ``|U.T @ W @ V|_F^2`` over uniformly random orthonormal ``U [out, r]`` and ``V [in, r]``.

    ``r * |W|_F / sqrt(out * in)``: each of the ``r^2`` entries has its even share of the square.

    Raises:
        ValueError: there are no such matrices.
    """
    if not (0 <= r <= min(out_features, in_features) and min(out_features, in_features) > 0):
        raise ValueError(
            f"expected_random_norm: r is {r}, of a matrix with out_features={out_features}, in_features={in_features}; "
            "want 0 <= r <= the smaller, and that at least 1"
        )
    return r * weight_norm / math.sqrt(out_features * in_features)


@checked
def leading_ranks(count: int) -> list[int]:
    """Numbers of leading directions to tell figures for: 1, 2, 4, ... and ``count``, all of them.

    ValueError: ``count`` is below 0.
    """
    if count < 0:
        raise ValueError(f"leading_ranks: count is {count}, want at least 0")
    return sorted({2**i for i in range(int(count).bit_length())} | {count}) if count else []


def _leading_norms(projected: Tensor, ranks: list[int]) -> list[float]:
    return [torch.linalg.matrix_norm(projected[:r, :r]).item() for r in ranks]
