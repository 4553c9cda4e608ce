"""A linear layer's weight, plain or quantised, with a factor for each row: what a DoRA adapter is merged into."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_ext.quantized.grid import Grid
from lora_ext.quantized.weight import QuantizedWeight


class RescaledWeight(QuantizedWeight):
    """Merges by a copy of the stored bytes, as quantised weights do: no small record can undo a factor for each row.

    It is not in ``FORMATS``: :attr:`inner` says what the layer holds.

    Args:
        module: the layer.
        inner: its weight if that is quantised, else None.
        factor: ``[out_features]``; None: 1.
    """

    def __init__(self, module: nn.Module, inner: QuantizedWeight | None, factor: Tensor | None = None) -> None:
        super().__init__(module)
        self.inner, self.factor = inner, factor
        self.rounds, self.has_grid = inner is not None, inner is not None and inner.has_grid
        weight = module._parameters["weight"]
        self._is_transposed = inner is None and type(module).__name__ == "Conv1D"
        self.sum_dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return False

    @property
    def name(self) -> str:
        return "plain" if self.inner is None else self.inner.name

    @property
    def shape(self) -> tuple[int, int]:
        if self.inner is not None:
            return self.inner.shape
        rows, columns = self.module.weight.shape
        return (columns, rows) if self._is_transposed else (rows, columns)

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.module.weight.detach()} if self.inner is None else self.inner.stored()

    def dequantize(self) -> Tensor:
        if self.inner is not None:
            values = self.inner.dequantize()
        else:
            weight = self.module.weight.detach()
            values = (weight.T if self._is_transposed else weight).to(self.sum_dtype, copy=True)
        return values

    def values_to_update(self) -> Tensor:
        values = self.dequantize()
        return values if self.factor is None else values.mul_(self.factor.unsqueeze(1).to(values.device))

    def quantize(self, values: Tensor) -> dict[str, Tensor]:
        if self.inner is not None:
            return self.inner.quantize(values)
        return {"weight": (values.T if self._is_transposed else values).to(self.module.weight.dtype)}

    def grid(self, quantized: Mapping[str, Tensor]) -> Grid:
        return self.inner.grid(quantized)

    def why_not_quantize(self) -> str | None:
        return None if self.inner is None else self.inner.why_not_quantize()
