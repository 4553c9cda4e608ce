"""Adds to each row of a layer's output the update of the adapter that the row chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lora_ext import functional
from lora_ext._ops import grouped
from lora_ext.nn.rows import RowChoice

if TYPE_CHECKING:
    from lora_ext.nn.layer import AdapterLayer


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
    alike: dict[tuple[float, torch.dtype], dict[str, RowUpdate]] = {}  # what one op can do
    for name, update in updates.items():
        alike.setdefault((update.dropout_p, update.lora_A.dtype), {})[name] = update
    for (dropout_p, _), held in alike.items():
        groups = choice.token_groups(tuple(held), times, x, layer)
        seed = seeds(dropout_p) if seeds is not None and dropout_p else None
        if y.device.type in grouped.DEVICES:
            lora_As, lora_Bs, values, *_ = zip(*held.values(), strict=True)
            scalings = choice.scalings(values, y.device)
            y = functional.lora_grouped_(y, x, lora_As, lora_Bs, groups, scalings, None, dropout_p, seed)
        else:
            y = _add_one_by_one(y, x, groups, tuple(held.values()), seed)
    return _add_biases(y, choice, updates, times, layer)


def _add_one_by_one(
    y: Tensor, x: Tensor, groups: Tensor, updates: tuple[RowUpdate, ...], seed: Tensor | None
) -> Tensor:
    """Adds one update after the other, where ``lora_grouped_`` has no kernels."""
    flat_y, flat_x = (y, x) if groups.dim() == 1 else (y.flatten(0, 1), x.flatten(0, 1))
    groups = groups.flatten()
    for i, (lora_A, lora_B, scaling, dropout_p, _) in enumerate(updates):
        rows = (groups == i).nonzero().squeeze(1)
        part = functional.lora_delta_(flat_y[rows], flat_x[rows], lora_A, lora_B, scaling, dropout_p, seed)
        flat_y = flat_y.index_copy_(0, rows, part)
    return flat_y.view(y.shape)


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
