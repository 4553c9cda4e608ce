"""Storage for the adapters of a pool in one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lora_ext import functional
from lora_ext._ops.checks import FLOATING
from lora_ext.nn.rows.choice import RowChoice

if TYPE_CHECKING:
    from lora_ext.nn.adapter_layer import AdapterLayer


class LayerSlots:
    """Factors of many adapters, each in a slot of the same size. Memory is allocated once and never moves.

    A slot is written while no call uses it; calls that read other slots go on meanwhile. Copies of the layer share the
    storage, as the pool fills it for all of them.

    Attributes:
        lora_A, lora_B: ``[slots, r, in_features]`` and ``[slots, out_features, r]``; ranks beyond an adapter's are not
            initialised.
        ranks: int64 ``[slots]``; 0: the adapter has no part in this layer.
        scalings: float64 ``[slots]``.
    """

    def __init__(
        self, slots: int, r: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if dtype not in FLOATING:
            raise ValueError(f"AdapterPool: dtype is {dtype}, want one of {', '.join(map(str, FLOATING))}")
        with torch.inference_mode(False):
            self.lora_A = torch.empty(slots, r, in_features, dtype=dtype, device=device)
            self.lora_B = torch.empty(slots, out_features, r, dtype=dtype, device=device)
            self.ranks = torch.zeros(slots, dtype=torch.int64, device=device)
            self.scalings = torch.zeros(slots, dtype=torch.float64, device=device)

    @torch.no_grad()
    def write(self, slot: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Fills a slot with factors ``[rank, in_features]`` and ``[out_features, rank]`` of any dtype and device."""
        rank = lora_A.shape[0]
        self.lora_A[slot, :rank].copy_(lora_A)
        self.lora_B[slot, :, :rank].copy_(lora_B)
        self.scalings[slot] = scaling
        self.ranks[slot] = rank

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        self.ranks[slot] = 0

    def add_chosen(self, y: Tensor, x: Tensor, choice: RowChoice, times: int, layer: AdapterLayer) -> Tensor:
        """Adds the updates of the slots that the rows have chosen to ``y``, in place."""
        groups = choice.slots_of(x, times, layer)
        return functional.lora_grouped_(y, x, self.lora_A, self.lora_B, groups, self.scalings, self.ranks)

    def linear_with_chosen(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, choice: RowChoice, times: int, layer: AdapterLayer
    ) -> Tensor:
        """Returns ``F.linear(x, weight, bias)`` with the updates of the slots that the rows have chosen."""
        groups = choice.slots_of(x, times, layer)
        return functional.lora_grouped_linear(
            x, weight, bias, self.lora_A, self.lora_B, groups, self.scalings, self.ranks
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSlots:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model whose layers serve an AdapterPool cannot be pickled; call pool.close() first")
