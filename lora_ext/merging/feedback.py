"""Quantises a sum again so that the layer's outputs keep an update: error feedback (GPTQ, arXiv 2210.17323).

Columns are rounded one after the other. The error of each is pushed onto the columns that are not rounded yet, by the
inverse of ``H = X.T @ X`` of the layer's inputs ``X``, so that the sum of squares of ``(rounded - sum) @ X.T`` falls
(Hassibi and Stork 1993). The scales are those of nearest rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_ext.quantized import QuantizedWeight
from lora_ext.quantized.grid import Grid

_DAMPING = 0.01  # of the mean of H's diagonal, added to it
_BLOCKS = 64, 8  # columns whose errors reach the columns after them in one product, those of the block by the smaller


class LayerInputs:
    """Inputs of a layer, or of several that read the same tensors: ``[tokens, in_features]`` each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self._factor: tuple[Tensor, Tensor] | None = None

    def factor(self) -> tuple[Tensor, Tensor]:
        """Returns ``U`` with ``U.T @ U = H^-1``, upper triangular, and the order of columns that it is for, int64.

        Columns with the largest inputs come first. The factorisation is float64.
        """
        if self._factor is None:
            first = self.tensors[0]
            hessian = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64, device=first.device)
            for tensor in self.tensors:
                rows = tensor.float()  # rounding is far below the damping
                hessian += rows.T @ rows
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
            damping = float(hessian.diagonal().mean()) * _DAMPING
            hessian.diagonal().add_(damping or 1.0)  # inputs of zeros: any rounding is as good
            # H = R @ R.T with R upper triangular is the Cholesky factor in reverse order; then U = R^-1.
            root = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).float()
            identity = torch.eye(len(root), device=root.device)
            self._factor = torch.linalg.solve_triangular(root, identity, upper=True), order
        return self._factor

    def forget(self) -> None:
        """Frees the factor."""
        self._factor = None

    def output_error(self, difference: Tensor) -> float:
        """Sum of squares of ``difference.T @ X.T``; difference: ``[in_features, out_features]``, float32."""
        return sum(float((tensor.float() @ difference).square().sum(dtype=torch.float64)) for tensor in self.tensors)


def quantize_for(weight: QuantizedWeight, values: Tensor, inputs: LayerInputs) -> Mapping[str, Tensor]:
    """Quantises ``values [out_features, in_features]``, float32, for these inputs. The weight has a grid.

    Error feedback is greedy: where nearest rounding has the smaller error on the inputs, its codes are taken.
    """
    grid = weight.grid(weight.quantize(values))
    columns = values.T.contiguous()
    nearest_codes, rounded = grid.nearest(columns, *grid.of_columns(torch.arange(len(columns), device=columns.device)))
    codes, fed = _round_columns(columns, grid, *inputs.factor())
    if inputs.output_error(fed.sub_(columns)) < inputs.output_error(rounded.sub_(columns)):
        return grid.pack(codes.T)
    return grid.pack(nearest_codes.T)


def _round_columns(columns: Tensor, grid: Grid, upper: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds columns ``[in_features, out_features]`` with feedback: returns their codes and values."""
    rest, n = columns[order], len(order)
    codes, values = torch.empty_like(columns, dtype=torch.int16), torch.empty_like(columns)
    errors = rest.new_empty(_BLOCKS[0], rest.shape[1])
    weights = (1 / upper.diagonal()).tolist()
    # Views are made once: of thousands of short columns, each operation counts.
    rows, values_of, codes_of, errors_of = rest.unbind(), values.unbind(), codes.unbind(), errors.unbind()
    grid_of = list(zip(*(each.expand_as(rest).unbind() for each in grid.of_columns(order)), strict=True))

    def push(begin: int, end: int, last: int, first_error: int) -> None:
        """Pushes the errors of columns [begin, end) onto [end, last)."""
        done = errors[begin - first_error : end - first_error]
        rest[end:last].addmm_(upper[begin:end, end:last].T, done, alpha=-1)

    for block in range(0, n, _BLOCKS[0]):
        block_end = min(block + _BLOCKS[0], n)
        for begin in range(block, block_end, _BLOCKS[1]):
            end = min(begin + _BLOCKS[1], block_end)
            for j in range(begin, end):
                code, _ = grid.nearest(rows[j], *grid_of[j], out=values_of[j])
                codes_of[j].copy_(code)
                torch.sub(rows[j], values_of[j], out=errors_of[j - block]).mul_(weights[j])
                rest[j + 1 : end].addr_(upper[j, j + 1 : end], errors_of[j - block], alpha=-1)
            push(begin, end, block_end, block)
        push(block, block_end, n, block)
    place = order.argsort()
    return codes[place], values[place]
