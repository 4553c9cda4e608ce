"""Makes random mixed batches for the tests of lora_grouped_."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lora_ext import functional


@dataclass
class Grouped:
    """The arguments of ``lora_grouped_`` except dropout, and a gradient of its result."""

    y: Tensor
    x: Tensor
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    group_of_row: Tensor
    scalings: Tensor
    ranks: Tensor | None
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> Grouped:
        As, Bs = [A.to(dtype) for A in self.lora_As], [B.to(dtype) for B in self.lora_Bs]
        tensors = {name: getattr(self, name).to(dtype) for name in ("y", "x", "grad_y")}
        return replace(self, lora_As=As, lora_Bs=Bs, **tensors)

    def choice(self) -> tuple:
        """Returns the arguments after the factors: which rows use which factors."""
        return self.group_of_row, self.scalings, self.ranks

    def args(self) -> tuple:
        return self.y.clone(), self.x, self.lora_As, self.lora_Bs, *self.choice()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The factors of each group, with the ranks that it uses."""
        pairs = []
        for A, B in zip(self.lora_As, self.lora_Bs, strict=True):
            pairs += zip(A, B, strict=True) if A.dim() == 3 else [(A, B)]
        ranks = [len(A) for A, _ in pairs] if self.ranks is None else self.ranks.tolist()
        return [(A[:r], B[:, :r]) for (A, B), r in zip(pairs, ranks, strict=True)]


def random_groups(
    num_tokens: int,
    features: tuple[int, int],
    entries: list[int | tuple[int, int]],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    ranks: bool = False,
    leading: tuple = (),
    groups: Tensor | None = None,
) -> Grouped:
    """Makes rows of random groups, and -1.

    Args:
        entries: for each entry the rank of a matrix, or the slots and the rank of a stack.
        ranks: whether groups use a random number of their ranks.
        groups: the group of each row; None: random.
    """
    (in_features, out_features), (dtype, factor_dtype) = features, dtypes
    tokens = leading or (num_tokens,)
    shapes = [(entry,) if isinstance(entry, int) else entry for entry in entries]
    most = torch.tensor([r for *slots, r in shapes for _ in range(slots[0] if slots else 1)])
    return Grouped(
        y=torch.randn(*tokens, out_features).to(dtype),
        x=torch.randn(*tokens, in_features).to(dtype),
        lora_As=[(torch.randn(*shape, in_features) / in_features**0.5).to(factor_dtype) for shape in shapes],
        lora_Bs=[torch.randn(*slots, out_features, r).to(factor_dtype) for *slots, r in shapes],
        group_of_row=torch.randint(-1, len(most), tokens) if groups is None else groups,
        scalings=torch.rand(len(most), dtype=torch.float64) + 0.5,
        ranks=(torch.rand(len(most)) * (most + 1)).long() if ranks else None,
        grad_y=torch.randn(*tokens, out_features).to(dtype),
    )


def watch_calls(monkeypatch: pytest.MonkeyPatch, see: Callable[[dict], None]) -> None:
    """Shows the arguments, by name, of each call for a mixed batch, unless no row has an adapter."""

    def watch(name: str) -> None:
        function = getattr(functional, name)
        signature = inspect.signature(function)

        def watched(*values):
            call = signature.bind(*values).arguments
            if call["group_of_row"].dim():
                see(call)
            return function(*values)

        monkeypatch.setattr(functional, name, watched)

    watch("lora_grouped_")
    watch("lora_grouped_linear")
