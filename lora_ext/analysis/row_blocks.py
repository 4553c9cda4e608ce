"""Products of a large matrix with a few vectors, by blocks of rows, so that the matrix is never converted whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_ext._ops import checks
from lora_ext._ops.checks import accumulation_dtype
from lora_ext._ops.tensor_arguments import check_tensors

# 2 MB in float32: converted values are still in the thread's cache when they are multiplied, which halves the time.
# A block has this many elements per thread, so that more threads do not synchronise more often.
ELEMENTS_PER_THREAD = 512 << 10


def check_matrix(caller: str, name: str, matrix: Tensor) -> None:
    """Raises TypeError or ValueError unless it is a dense matrix of a supported floating dtype that has values."""
    check_tensors(caller, {name: matrix})
    checks.check_matrix(caller, name, matrix)
    if matrix.is_meta:
        raise ValueError(f"{caller}: {name} is on the meta device, where it has no values")


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Computes ``matrix @ vectors``: ``[rows, cols]`` (any floating dtype), ``[cols, k]``, as float64 ``[rows, k]``.

    The products are float32, or float64 for a float64 matrix.
    """
    vectors = vectors.to(accumulation_dtype(matrix.dtype))
    return torch.cat([(block @ vectors).double() for _, block in _blocks(matrix)])


def multiply_transposed(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Computes ``matrix.T @ vectors``: ``[rows, cols]`` (any floating dtype), ``[rows, k]``, as float64 ``[cols, k]``.

    The products are as in :func:`multiply`; blocks are summed in float64.
    """
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
