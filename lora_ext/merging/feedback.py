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
_BLOCK = 64  # columns whose errors reach the columns after them in one product


class LayerInputs:
    """Inputs of a layer, or of several that read the same tensors: ``[tokens, in_features]`` each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self._factor: tuple[Tensor, Tensor] | None = None

    def factor(self) -> tuple[Tensor, Tensor]:
        """Returns ``U`` with ``U.T @ U = H^-1``, upper triangular, and the order of columns that it is for, int64.

        Columns with the largest inputs come first. Sums and the factorisation are float64.
        """
        if self._factor is None:
            first = self.tensors[0]
            hessian = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64, device=first.device)
            for tensor in self.tensors:
                rows = tensor.double()
                hessian.addmm_(rows.T, rows)
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
            damping = float(hessian.diagonal().mean()) * _DAMPING
            hessian.diagonal().add_(damping or 1.0)  # inputs of zeros: any rounding is as good
            # H = R @ R.T with R upper triangular is the Cholesky factor in reverse order; then U = R^-1.
            root = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
            identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
            upper = torch.linalg.solve_triangular(root, identity, upper=True)
            self._factor = upper.float(), order
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
    nearest_codes, rounded = grid.nearest(columns, torch.arange(len(columns), device=columns.device))
    codes, fed = _round_columns(columns, grid, *inputs.factor())
    if inputs.output_error(fed.sub_(columns)) < inputs.output_error(rounded.sub_(columns)):
        return grid.pack(codes.T)
    return grid.pack(nearest_codes.T)


def _round_columns(columns: Tensor, grid: Grid, upper: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds columns ``[in_features, out_features]`` with feedback: returns their codes and values."""
    rest, numbers, n = columns[order], order.tolist(), len(order)
    codes, values = torch.empty_like(columns, dtype=torch.int16), torch.empty_like(columns)
    scales = (1 / upper.diagonal()).tolist()
    errors = rest.new_empty(_BLOCK, rest.shape[1])
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        for j in range(begin, end):
            codes[numbers[j]], value = grid.nearest(rest[j], numbers[j])
            values[numbers[j]] = value
            error = torch.sub(rest[j], value, out=errors[j - begin]).mul_(scales[j])
            rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        rest[end:].addmm_(upper[begin:end, end:].T, errors[: end - begin], alpha=-1)
    return codes, values
