"""Several active adapters of a layer as one update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """What an op adds to a layer's output: ``scaling * dropout(x) @ lora_A.T @ lora_B.T``."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float


def joined(updates: Sequence[Update], rank_dim: int = 0) -> list[Update]:
    """Concatenates the ranks of updates that one op can compute, so that the output is read and rounded once for all.

    These have one dropout probability, and factors of one dtype on one device; they then share a dropout mask. If
    scalings differ, their ratios are multiplied into ``lora_B``; 16-bit factors would be rounded by that, and are
    joined only where scalings are equal. Gradients flow to each adapter's factors. An update that no other goes with
    is returned as it is.

    Args:
        updates: ``lora_B`` is ``[out_features, r, ...]``.
        rank_dim: the dimension of the ranks in ``lora_A``, which may also be a tensor made from it.

    Returns:
        One update for each kind, in the order of the first of each.
    """
    if len(updates) < 2:
        return list(updates)
    kinds: dict[tuple, list[Update]] = {}
    for update in updates:
        dtype = update.lora_B.dtype
        kind = update.dropout_p, dtype, update.lora_B.device, update.scaling if dtype.itemsize < 4 else None
        kinds.setdefault(kind, []).append(update)
    return [_concatenated(alike, rank_dim) for alike in kinds.values()]


def _concatenated(updates: list[Update], rank_dim: int) -> Update:
    if len(updates) == 1:
        return updates[0]
    scaling = max(abs(update.scaling) for update in updates)
    lora_Bs = [u.lora_B if u.scaling == scaling else u.lora_B * (u.scaling / scaling) for u in updates]
    lora_A = torch.cat([update.lora_A for update in updates], rank_dim)
    return Update(lora_A, torch.cat(lora_Bs, 1), scaling, updates[0].dropout_p)


def sum_of_biases(bias: Tensor | None, scaled: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Adds the scaled biases of adapters to ``bias``, out of place; the sum is rounded to ``dtype`` once."""
    total = bias
    for update in scaled:
        total = update if total is None else total + update
    return bias if total is bias else total.to(dtype)
