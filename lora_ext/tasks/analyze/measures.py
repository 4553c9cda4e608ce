"""What is measured of one layer, as values that JSON can hold."""

from __future__ import annotations

import itertools
import math
import zlib
from typing import Any

import torch
from torch import Tensor

from lora_ext.analysis import (
    Svd,
    block_krylov_svd,
    effective_rank,
    energy_rank,
    expected_random_similarity,
    factored_svd,
    numerical_rank,
    projection_table,
    random_similarity_std,
    singular_basis,
    stable_rank,
    subspace_similarity,
)
from lora_ext.checkpoints import Layer, LayerWeight

__all__ = ["SIDES", "measure", "rounded"]

SIDES = ("A", "B")
_BLOCK_ELEMENTS = 1 << 20
_DIGITS = 6  # of what is written: beyond what single precision knows, and a third of the file's size


def measure(layer: Layer, num_adapters: int, *, directions: int, seed: int) -> dict[str, Any]:
    """Reads the layer's factors and weight, and measures them.

    Args:
        directions: at most so many leading directions of a side are compared with those of another.
        seed: with the layer's name it decides on the random directions, so that these do not depend on which other
            layers are measured.

    Returns:
        ``name``; ``shape``, ``[out, in]``; ``weight_norm``, or None; ``adapters``: of each its :func:`_update`, or None
        where it lacks the layer; ``similarity``: of each pair of adapters that have the layer (of a single one, its
        factors and its update), by side, their :func:`_similarity`.

    Raises:
        ValueError: a factor or the weight is not finite, naming it.
    """
    seed = zlib.crc32(f"{seed}:{layer.name}".encode())
    factors = {number: one.read() for number, one in layer.factors.items()}
    svds: dict[int, Svd] = {}
    for number, (A, B) in factors.items():
        one = layer.factors[number]
        try:
            svds[number] = factored_svd(A, B, one.update.scaling)
        except ValueError as error:
            raise ValueError(f"{layer.name} in {one.file.path}: {error}") from error
    bases = {number: {"A": singular_basis(A), "B": singular_basis(B.T)} for number, (A, B) in factors.items()}
    if num_adapters == 1:
        # Against itself a basis is 1 everywhere; which of a factor's directions the update uses most can differ.
        U, S, V = svds[0]
        used = numerical_rank(S)
        pairs = [(0, 0, bases[0], {"A": V[:, :used], "B": U[:, :used]})]
    else:
        pairs = [(i, j, bases[i], bases[j]) for i, j in itertools.combinations(factors, 2)]
    against = _against(layer.weight, svds, seed) if layer.weight is not None else {}
    result = {
        "name": layer.name,
        "shape": list(layer.shape),
        "weight_norm": next((table["weight_norm"] for table in against.values()), None),
        "adapters": [
            _update(layer, number, svds[number], against.get(number)) if number in factors else None
            for number in range(num_adapters)
        ],
        "similarity": [
            {"of": [i, j], **{side: _similarity(one[side], other[side], directions) for side in SIDES}}
            for i, j, one, other in pairs
        ],
    }
    layer.release()
    return rounded(result)


def _update(layer: Layer, number: int, svd: Svd, table: dict[str, Any] | None) -> dict[str, Any]:
    """Of one adapter's update: its size, its spectrum, and its place in the weight where there is one."""
    update, S = layer.factors[number].update, svd.S
    norm = torch.linalg.vector_norm(S).item()
    weight_norm = table["weight_norm"] if table else None
    return {
        "r": update.r,
        "scaling": update.scaling,
        "norm": norm,
        "relative_change": norm / weight_norm if weight_norm else None,
        "singular_values": S.tolist(),
        "numerical_rank": numerical_rank(S),
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        "rank_of_90_percent": energy_rank(S, 0.9),
        "rank_of_99_percent": energy_rank(S, 0.99),
        "projection": {key: value for key, value in table.items() if not key.endswith("norm")} if table else None,
    }


def _against(weight: LayerWeight, svds: dict[int, Svd], seed: int) -> dict[int, dict[str, Any]]:
    """The projection table of each update, by the adapter's number; the weight's own directions are found once."""
    matrix = weight.read()
    if not _is_finite(matrix):
        raise ValueError(f"{weight.key} of {weight.checkpoint.directory} is not finite")
    # Norms of projections do not change when all is transposed: the weight stays as it lies.
    lying = {n: Svd(svd.V, svd.S, svd.U) if weight.transposed else svd for n, svd in svds.items()}
    count = max(numerical_rank(svd.S) for svd in svds.values())
    own = block_krylov_svd(matrix, count, seed=seed) if count else None
    return {n: vars(projection_table(matrix, svd, seed=seed, own=own)) for n, svd in lying.items()}


def _is_finite(matrix: Tensor) -> bool:
    """Whether the matrix has a finite norm. Reads blocks of rows: isfinite() of the whole would make three copies."""
    height = max(_BLOCK_ELEMENTS // max(matrix.shape[1], 1), 1)
    return all(torch.linalg.vector_norm(rows, dtype=torch.float64).isfinite() for rows in matrix.split(height))


def _similarity(first: Tensor, second: Tensor, directions: int) -> dict[str, Any]:
    """``phi`` of the leading directions of two bases ``[dimension, k]``, and its last entry beside what is random.

    ``last`` has all of the compared directions; ``random_mean`` and ``random_std`` are those of random subspaces of as
    many. None where one of them has no direction.
    """
    grid = subspace_similarity(first[:, :directions], second[:, :directions])
    i, j = grid.shape
    dimension = len(first)
    last = None
    if i and j:
        moments = expected_random_similarity(i, j, dimension), random_similarity_std(i, j, dimension)
        last = [grid[-1, -1].item(), *(one[-1, -1].item() for one in moments)]
    names = ("last", "random_mean", "random_std")
    return {
        "phi": grid.tolist(),
        "dimension": dimension,
        **dict(zip(names, last or [None] * len(names), strict=True)),
    }


def rounded(value: Any) -> Any:
    """Numbers to the digits that are written; None for what is infinite, which JSON has no word for."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return value
