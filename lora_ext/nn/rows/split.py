"""Computes the rows of each adapter apart, in layers that no op computes for all adapters at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.nn.adapter_layer import AdapterLayer
from lora_ext.nn.rows.choice import RowChoice


def add_by_rows(
    y: Tensor,
    x: Tensor,
    choice: RowChoice,
    present: tuple[str, ...],
    times: int,
    layer: AdapterLayer,
    add: Callable[[Tensor, Tensor, str], Tensor],
) -> Tensor:
    """Replaces the rows of ``y`` that belong to an adapter by ``add(rows of y, rows of x, name)``, in place.

    If tokens choose, not rows, they are the rows here.

    Args:
        y, x: output and input of ``layer``, row by row.
        present: the adapters that the layer has; rows of other names stay as they are.
        times: consecutive rows for each name.
    """
    groups, dims = choice.row_groups(present, times, x, layer)
    shape = y.shape
    y, x = y.flatten(0, dims - 1), x.flatten(0, dims - 1)
    for i, name in enumerate(present):
        rows = (groups == i).nonzero().squeeze(1)
        y = y.index_copy_(0, rows, add(y[rows], x[rows], name))
    return y.view(shape)


def call_by_rows(
    choice: RowChoice, layer: AdapterLayer, modules: Mapping[str, nn.Module], base: nn.Module, args: tuple, kwargs: dict
) -> Tensor:
    """Calls for each row the module of its adapter, or ``base``; every module once, with all its rows.

    If ``base`` is or has layers with adapters, it gets all rows of the batch.

    Raises:
        ValueError: the first argument is no tensor with a row for each name, or a module returns something else.
    """
    if not args or not isinstance(args[0], Tensor):
        raise ValueError(f"{type(layer).__name__}: adapter_names needs a tensor as the first argument of the layer")
    x, times = choice.aligned(layer, args[0])
    if len(set(choice.rows)) == 1 and x is args[0]:
        module = modules[choice.names[0]] if choice.names and choice.names[0] in modules else base
        return module(*args, **kwargs)
    present = tuple(name for name in choice.names if name in modules)
    groups, dims = choice.row_groups(present, times, x, layer)
    all_rows, shape, x = x, x.shape[:dims], x.flatten(0, dims - 1)
    rows = x.shape[0]
    outputs, order = [], []
    for i in range(-1, len(present)):
        index = (groups == i).nonzero().squeeze(1)
        if len(index):
            if i < 0 and _has_layers(base):  # they choose by themselves, from names for all rows
                y = base(all_rows, *args[1:], **kwargs)
                y = y.flatten(0, dims - 1)[index] if isinstance(y, Tensor) else y
            else:
                module = base if i < 0 else modules[present[i]]
                more = {name: _sliced(value, index, rows) for name, value in kwargs.items()}
                y = module(x[index], *(_sliced(value, index, rows) for value in args[1:]), **more)
            if not isinstance(y, Tensor) or not y.dim() or y.shape[0] != len(index):
                raise ValueError(
                    f"{type(layer).__name__}: adapter_names needs a module that returns a tensor with a row for each "
                    f"row of its input, not a {type(y).__name__}"
                )
            outputs.append(y)
            order.append(index)
    return torch.cat(outputs)[torch.cat(order).argsort()].unflatten(0, shape)


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, AdapterLayer) for part in module.modules())


def _sliced(value: Any, index: Tensor, rows: int) -> Any:
    """Returns the chosen rows of ``value`` if it is a tensor with as many rows as the batch, otherwise ``value``."""
    return value[index] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
