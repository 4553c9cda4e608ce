"""The low-rank updates of the experts in one parameter, as a call of its module needs them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertUpdate(NamedTuple):
    """An adapter's update of all experts: ``scaling * lora_B[e] @ lora_A[e]`` is that of expert ``e``.

    A parameter ``[out_features, in_features]`` is one expert.
    """

    lora_A: Tensor  # [num_experts, r, in_features]
    lora_B: Tensor  # [num_experts, out_features, r]
    scaling: float


class StackedUpdates:
    """The updates of one parameter during one call of its module.

    Attributes:
        weight: the parameter, ``[num_experts, rows, columns]`` or ``[rows, columns]``.
        is_transposed: it is stored as ``[..., in_features, out_features]``.
        is_read: the module has used the parameter.
        whole: the functions that needed the whole updated parameter.
    """

    def __init__(self, weight: Tensor, is_transposed: bool, updates: list[ExpertUpdate]) -> None:
        self.weight = weight
        self.is_transposed = is_transposed
        self.updates = updates
        self.is_read = False
        self.whole: list[str] = []
        self._in_rows: list[ExpertUpdate] | None = None
        self._of_experts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None
        self._updated: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return 1 if self.weight.dim() == 2 else self.weight.shape[0]

    def in_rows(self) -> list[ExpertUpdate]:
        """Returns the updates with contiguous factors: adapters interleave the experts in ``lora_B``."""
        if self._in_rows is None:
            self._in_rows = [
                ExpertUpdate(u.lora_A.contiguous(), u.lora_B.contiguous(), u.scaling) for u in self.updates
            ]
        return self._in_rows

    def of_expert(self, number: int) -> list[tuple[Tensor, Tensor, float]]:
        """``(lora_A, lora_B, scaling)`` of one expert."""
        factors = [factor for update in self.updates for factor in update[:2]]
        if not (torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)):
            return [(u.lora_A[number], u.lora_B[number].contiguous(), u.scaling) for u in self.updates]
        if self._of_experts is None:  # unbind: a select for each expert would have a gradient of the stack's size
            self._of_experts = [(u.lora_A.unbind(), u.lora_B.unbind()) for u in self.in_rows()]
        return [
            (lora_As[number], lora_Bs[number], update.scaling)
            for (lora_As, lora_Bs), update in zip(self._of_experts, self.updates, strict=True)
        ]

    def expert_numbers(self) -> Tensor:
        """Returns the experts' numbers, int64 ``[num_experts]``."""
        return torch.arange(self.num_experts, device=self.weight.device)

    def updated(self) -> Tensor:
        """Returns the whole parameter with the updates, as it is stored; computed once."""
        if self._updated is None:
            lora_A = torch.cat([update.lora_A for update in self.updates], dim=1)
            lora_B = torch.cat([update.lora_B * update.scaling for update in self.updates], dim=2)
            self._updated = add_product(self.weight, lora_A, lora_B, self.is_transposed)
        return self._updated


def add_product(base: Tensor, lora_A: Tensor, lora_B: Tensor, is_transposed: bool) -> Tensor:
    """``base [..., rows, columns]`` plus ``lora_B @ lora_A`` (transposed if ``is_transposed``), in its dtype."""
    left, right = (lora_A.transpose(-2, -1), lora_B.transpose(-2, -1)) if is_transposed else (lora_B, lora_A)
    left, right = left.to(base.dtype), right.to(base.dtype)
    with torch.autocast(base.device.type, enabled=False):  # the parameter keeps its dtype
        stack = base.reshape(-1, *base.shape[-2:])
        sums = torch.baddbmm(stack, left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:]))
    return sums.view(base.shape)
