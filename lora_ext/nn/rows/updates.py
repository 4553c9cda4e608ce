"""Adds to each row of a layer's output the update of the adapter that the row chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_ext import functional
from lora_ext.nn import base_product
from lora_ext.nn.rows.choice import RowChoice

if TYPE_CHECKING:
    from lora_ext.nn.adapter_layer import AdapterLayer


class RowUpdates:
    """Adapters' updates of a linear layer: arguments of :func:`lora_ext.functional.lora_grouped_`, and biases.

    They are columns, not an object for each adapter: a batch of 32 adapters asks every layer for them.

    Attributes:
        names, lora_As, lora_Bs, scalings, dropouts: one entry for each adapter.
        biases: by name, scaled already.
    """

    __slots__ = ("biases", "dropouts", "lora_As", "lora_Bs", "names", "scalings")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.lora_As: list[Tensor] = []
        self.lora_Bs: list[Tensor] = []
        self.scalings: list[float] = []
        self.dropouts: list[float] = []
        self.biases: dict[str, Tensor] = {}

    def add(
        self,
        name: str,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float,
        scaled_bias: Tensor | None = None,
    ) -> None:
        self.names.append(name)
        self.lora_As.append(lora_A)
        self.lora_Bs.append(lora_B)
        self.scalings.append(scaling)
        self.dropouts.append(dropout_p)
        if scaled_bias is not None:
            self.biases[name] = scaled_bias

    def alike(self) -> list[RowUpdates]:
        """Splits them, without biases, into those that one op can compute: of one dropout and one dtype."""
        if len(set(self.dropouts)) == 1 and len({lora_A.dtype for lora_A in self.lora_As}) == 1:
            return [self]
        kinds = [(p, lora_A.dtype) for p, lora_A in zip(self.dropouts, self.lora_As, strict=True)]
        distinct = dict.fromkeys(kinds)
        parts = {kind: RowUpdates() for kind in distinct}
        columns = zip(self.names, self.lora_As, self.lora_Bs, self.scalings, self.dropouts, strict=True)
        for kind, entries in zip(kinds, columns, strict=True):
            parts[kind].add(*entries)
        return list(parts.values())


def add_chosen(
    y: Tensor,
    x: Tensor,
    choice: RowChoice,
    updates: RowUpdates,
    times: int,
    seeds: Callable[[float], Tensor | None] | None = None,
    layer: AdapterLayer | None = None,
) -> Tensor:
    """Adds the chosen updates to ``y``, in place.

    Args:
        y: ``[rows, ..., out_features]``, contiguous.
        x: ``[rows, ..., in_features]``, device and dtype of ``y``.
        updates: rows of other names stay as they are.
        times: consecutive rows for each name.
        seeds: gives the dropout seed for a probability; None: each op draws one.
        layer: the layer, for messages.
    """
    for part in updates.alike():
        dropout_p = part.dropouts[0]
        groups, scalings = _chosen(choice, part, x, times, layer)
        seed = seeds(dropout_p) if seeds is not None and dropout_p else None
        y = functional.lora_grouped_(y, x, part.lora_As, part.lora_Bs, groups, scalings, None, dropout_p, seed)
    return _add_biases(y, choice, updates.biases, times, layer)


def linear_with_chosen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    choice: RowChoice,
    updates: RowUpdates,
    times: int,
    seeds: Callable[[float], Tensor | None] | None = None,
    layer: AdapterLayer | None = None,
) -> Tensor:
    """Returns ``F.linear(x, weight, bias)`` with the chosen updates: in one call, if one op can compute them all.

    The other arguments are those of :func:`add_chosen`.
    """
    if any(updates.dropouts) or len(updates.alike()) != 1:
        y = base_product.product(x, weight, bias)
        return add_chosen(y, x.to(y.dtype), choice, updates, times, seeds, layer)
    groups, scalings = _chosen(choice, updates, x, times, layer)
    y = functional.lora_grouped_linear(x, weight, bias, updates.lora_As, updates.lora_Bs, groups, scalings)
    return _add_biases(y, choice, updates.biases, times, layer)


def _chosen(
    choice: RowChoice, updates: RowUpdates, x: Tensor, times: int, layer: AdapterLayer | None
) -> tuple[Tensor, Tensor]:
    """Returns the groups of the rows (or tokens), and the groups' scalings."""
    groups = choice.token_groups(tuple(updates.names), times, x, layer)
    return groups, choice.scalings(tuple(updates.scalings), x.device)


def _add_biases(
    y: Tensor, choice: RowChoice, scaled: dict[str, Tensor], times: int, layer: AdapterLayer | None
) -> Tensor:
    if not scaled:
        return y
    biases = {name: bias.to(y.dtype) for name, bias in scaled.items()}
    table = torch.stack([*biases.values(), torch.zeros_like(next(iter(biases.values())))])
    groups = choice.token_groups(tuple(biases), times, y, layer)
    of_row = table[groups]  # index -1: zeros
    return y + of_row.view(*groups.shape, *[1] * (y.dim() - groups.dim() - 1), -1)
