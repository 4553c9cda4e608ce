"""Adds to each row of a layer's output the update of the adapter that the row chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext import functional
from lora_ext._ops import grouped
from lora_ext.nn.rows import RowChoice


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
) -> Tensor:
    """Adds the chosen updates to ``y``, in place.

    Args:
        y: ``[rows, ..., out_features]``, contiguous.
        x: ``[rows, ..., in_features]``, device and dtype of ``y``.
        updates: by adapter name; rows of other names stay as they are.
        times: consecutive rows for each name.
        seeds: gives the dropout seed for a probability; None: each op draws one.
    """
    alike: dict[tuple[float, torch.dtype], dict[str, RowUpdate]] = {}  # what one op can do
    for name, update in updates.items():
        alike.setdefault((update.dropout_p, update.lora_A.dtype), {})[name] = update
    for (dropout_p, _), held in alike.items():
        groups = choice.groups(tuple(held), times, y.device)
        seed = seeds(dropout_p) if seeds is not None and dropout_p else None
        if y.device.type in grouped.DEVICES:
            lora_As, lora_Bs, values, *_ = zip(*held.values(), strict=True)
            scalings = choice.scalings(values, y.device)
            y = functional.lora_grouped_(y, x, lora_As, lora_Bs, groups, scalings, None, dropout_p, seed)
        else:
            y = _add_one_by_one(y, x, groups, tuple(held.values()), seed)
    return _add_biases(y, choice, updates, times)


def _add_one_by_one(
    y: Tensor, x: Tensor, groups: Tensor, updates: tuple[RowUpdate, ...], seed: Tensor | None
) -> Tensor:
    """Adds one update after the other, where ``lora_grouped_`` has no kernels."""
    for i, (lora_A, lora_B, scaling, dropout_p, _) in enumerate(updates):
        rows = (groups == i).nonzero().squeeze(1)
        part = functional.lora_delta_(y[rows], x[rows], lora_A, lora_B, scaling, dropout_p, seed)
        y = y.index_copy_(0, rows, part)
    return y


def _add_biases(y: Tensor, choice: RowChoice, updates: Mapping[str, RowUpdate], times: int) -> Tensor:
    biases = {name: update.bias.to(y.dtype) for name, update in updates.items() if update.bias is not None}
    if not biases:
        return y
    table = torch.stack([*biases.values(), torch.zeros_like(next(iter(biases.values())))])
    of_row = table[choice.groups(tuple(biases), times, y.device)]  # index -1: zeros
    return y + of_row.view(len(y), *[1] * (y.dim() - 2), -1)
