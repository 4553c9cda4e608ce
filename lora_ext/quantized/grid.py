"""The values that a quantised weight can have once its scales are fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values ``(code - zero) * scale``, or ``table[code] * scale``, of each element; columns are stored as rows.

    Attributes:
        scale: ``[groups, out_features]``, float32; ``group`` columns of the weight share a row of it.
        inverse: what a value is multiplied by to find its code, as the library does: ``1 / scale`` to rounding.
        pack: makes the stored tensors of codes ``[out_features, in_features]``.
        limits: the lowest and the highest code.
        zero: ``[groups, out_features]``, the code of 0; None: 0.
        table: the sorted values of codes that are no integers. ``pack`` gets positions in it.
    """

    scale: Tensor
    inverse: Tensor
    group: int
    pack: Callable[[Tensor], Mapping[str, Tensor]]
    limits: tuple[int, int] = (0, 0)
    zero: Tensor | None = None
    table: Tensor | None = None

    @cached_property
    def _borders(self) -> Tensor:
        return (self.table[1:] + self.table[:-1]) / 2

    def nearest(self, values: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        """Returns the codes nearest to ``values`` of a column, or of columns, and the values of these codes.

        Args:
            values: ``[out_features]`` for one column, ``[columns, out_features]`` for several, float32.
            column: its number; for several, int64 ``[columns]``.
        """
        group = column // self.group
        scale = self.scale[group]
        scaled = values * self.inverse[group]
        if self.table is not None:
            codes = torch.bucketize(scaled, self._borders)
            return codes, self.table[codes] * scale
        if self.zero is None:
            codes = scaled.round_().clamp_(*self.limits)
            return codes, codes * scale
        zero = self.zero[group]
        codes = scaled.round_().add_(zero).clamp_(*self.limits)
        return codes, (codes - zero) * scale
