"""Checks the inputs of an attention layer, which it computes itself in the base layer's place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_inputs(
    who: str,
    base: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """ValueError, TypeError: the shapes do not match, a mask has another dtype, or a tensor is nested."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            raise ValueError(
                f"{who}: {name} is a nested tensor, which adapters do not support; pad it, or merge the adapter"
            )
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            raise ValueError(f"{who}: {name} has shape {list(x.shape)}, want 2 or 3 dimensions, as many as query")
    batch = 0 if base.batch_first else 1
    is_batched = query.dim() == 3
    N, L, S = (
        (query.shape[batch], query.shape[1 - batch], key.shape[1 - batch])
        if is_batched
        else (1, query.shape[0], key.shape[0])
    )
    if key.shape[:-1] != value.shape[:-1] or (is_batched and key.shape[batch] != N):
        raise ValueError(
            f"{who}: query, key and value have shapes {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}, want one batch size, and one length of key and value"
        )
    per_head = (N * base.num_heads, L, S)
    masks = {
        "key_padding_mask": (key_padding_mask, [(N, S) if is_batched else (S,)]),
        "attn_mask": (attn_mask, [(L, S), per_head]),
    }
    for name, (mask, shapes) in masks.items():
        if mask is None:
            continue
        if tuple(mask.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{who}: {name} has shape {list(mask.shape)}, want {wanted}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{who}: {name} is {mask.dtype}, want torch.bool or a floating-point dtype")
