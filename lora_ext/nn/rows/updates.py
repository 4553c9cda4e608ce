"""Adds to each row of a layer's output the update of the adapter that the row chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lora_ext import functional
from lora_ext.nn.rows.choice import RowChoice

if TYPE_CHECKING:
    from lora_ext.nn.adapter_layer import AdapterLayer


class RowUpdate(NamedTuple):
    """An adapter's update of a linear layer: arguments of :func:`lora_ext.functional.lora_delta_`, and its bias.

    The bias is scaled already.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    bias: Tensor | None = None


def add_chosen(
    y: Tensor,
    x: Tensor,
    choice: RowChoice,
    updates: Mapping[str, RowUpdate],
    times: int,
    seeds: Callable[[float], Tensor | None] | None = None,
    layer: AdapterLayer | None = None,
) -> Tensor:
    """Adds the chosen updates to ``y``, in place.

    Args:
        y: ``[rows, ..., out_features]``, contiguous.
        x: ``[rows, ..., in_features]``, device and dtype of ``y``.
        updates: by adapter name; rows of other names stay as they are.
        times: consecutive rows for each name.
        seeds: gives the dropout seed for a probability; None: each op draws one.
        layer: the layer, for messages.
    """
    kinds = [(update.dropout_p, update.lora_A.dtype) for update in updates.values()]
    for kind in dict.fromkeys(kinds):  # one op for those that are alike
        held = updates
        if kinds.count(kind) < len(kinds):
            held = {name: update for (name, update), other in zip(updates.items(), kinds, strict=True) if other == kind}
        dropout_p = kind[0]
        groups = choice.token_groups(tuple(held), times, x, layer)
        seed = seeds(dropout_p) if seeds is not None and dropout_p else None
        lora_As, lora_Bs, values, *_ = zip(*held.values(), strict=True)
        scalings = choice.scalings(values, y.device)
        y = functional.lora_grouped_(y, x, lora_As, lora_Bs, groups, scalings, None, dropout_p, seed)
    return _add_biases(y, choice, updates, times, layer)


def _add_biases(
    y: Tensor, choice: RowChoice, updates: Mapping[str, RowUpdate], times: int, layer: AdapterLayer | None
) -> Tensor:
    biases = {name: update.bias.to(y.dtype) for name, update in updates.items() if update.bias is not None}
    if not biases:
        return y
    table = torch.stack([*biases.values(), torch.zeros_like(next(iter(biases.values())))])
    groups = choice.token_groups(tuple(biases), times, y, layer)
    of_row = table[groups]  # index -1: zeros
    return y + of_row.view(*groups.shape, *[1] * (y.dim() - groups.dim() - 1), -1)
