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

    def of_columns(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Returns what :meth:`nearest` needs of ``columns``, int64: ``[columns or 1, out_features]`` each."""
        groups = columns // self.group if len(self.scale) > 1 else columns.new_zeros(1)
        return tuple(each[groups] for each in (self.scale, self.inverse, self.zero) if each is not None)

    def nearest(
        self, values: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor | None = None, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the codes nearest to ``values [..., out_features]``, float32, and the values of these codes.

        Args:
            scale, inverse, zero: of the values' columns.
            out: where to write the values of the codes.
        """
        scaled = values * inverse
        if self.table is not None:
            codes = torch.bucketize(scaled, self._borders, out_int32=True)
            found = self.table.index_select(0, codes.flatten()).view_as(scaled)
        elif zero is None:
            codes = found = scaled.round_().clamp_(*self.limits)
        else:
            codes = scaled.round_().add_(zero).clamp_(*self.limits)
            found = codes - zero
        return codes, torch.mul(found, scale, out=out)
