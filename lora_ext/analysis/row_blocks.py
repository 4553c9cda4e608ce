"""Products of a large matrix with a few vectors, a block of its rows at a time: no converted copy of it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_ext._ops.checks import FLOATING, accumulation_dtype

__all__ = ["check_matrix", "frobenius_norm", "multiply", "multiply_transposed"]

# 2 MB in float32: what a thread has converted is still in its cache when it is multiplied, which halves the time. A
# block is as many of these as there are threads, so that more threads do not wait for each other more often.
ELEMENTS_PER_THREAD = 512 << 10


def check_matrix(caller: str, name: str, matrix: Tensor) -> None:
    """TypeError or ValueError unless it is a dense matrix, with values, of one of the four floating dtypes."""
    if matrix.is_nested or matrix.layout is not torch.strided or matrix.dtype not in FLOATING:
        kind = "nested" if matrix.is_nested else f"{matrix.layout} {matrix.dtype}"
        raise TypeError(f"{caller}: {name} is {kind}, want a dense tensor of {', '.join(map(str, FLOATING))}")
    if matrix.dim() != 2:
        raise ValueError(f"{caller}: {name} is {list(matrix.shape)}, want a matrix of 2 dimensions")
    if matrix.is_meta:
        raise ValueError(f"{caller}: {name} is on the meta device, where it has no values")


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``matrix @ vectors``: ``[rows, cols]`` of any floating dtype times ``[cols, k]``, as float64 ``[rows, k]``.

    Computed in float32; in float64 where the matrix is.
    """
    vectors = vectors.to(accumulation_dtype(matrix.dtype))
    return torch.cat([(block @ vectors).double() for _, block in _blocks(matrix)])


def multiply_transposed(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``matrix.T @ vectors``: ``[rows, cols]`` of any floating dtype and ``[rows, k]``, as float64 ``[cols, k]``.

    Computed as in :func:`multiply`; the blocks' shares are added up in float64.
    """
    vectors = vectors.to(accumulation_dtype(matrix.dtype))
    total = torch.zeros(vectors.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for begin, block in _blocks(matrix):
        total += vectors[begin : begin + len(block)].T @ block
    return total.T


def frobenius_norm(matrix: Tensor) -> float:
    """Of a matrix of any floating dtype, in float64."""
    norms = (torch.linalg.vector_norm(block, dtype=torch.float64).item() for _, block in _blocks(matrix))
    return math.hypot(*norms)


def _blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``(first row, rows)`` in the dtype that is computed in."""
    height = max(ELEMENTS_PER_THREAD * torch.get_num_threads() // max(matrix.shape[1], 1), 1)
    for begin in range(0, len(matrix), height):
        yield begin, matrix[begin : begin + height].to(accumulation_dtype(matrix.dtype))
