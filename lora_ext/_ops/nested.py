"""Nested tensors: sequences of different lengths in one tensor. An op on features computes with all tokens at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_values(op: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies ``function`` (``[..., in_features]`` to ``[..., out_features]``) to the tokens of a nested tensor.

    As in nn.Linear, a jagged result shares the offsets of ``x``, so that PyTorch knows that both have one shape.

    Raises:
        ValueError: the features have different lengths.
    """
    if x.dim() < 2 or (x.layout is torch.jagged and x._ragged_idx == x.dim() - 1):
        raise ValueError(f"{op}: x is a nested tensor whose last dimension is jagged, want one of features")
    if x.layout is not torch.jagged:
        parts = x.unbind()
        values = function(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
        tokens = values.split([part.shape[:-1].numel() for part in parts])
        shaped = (t.reshape(*part.shape[:-1], t.shape[-1]) for t, part in zip(tokens, parts, strict=True))
        return torch.nested.as_nested_tensor(list(shaped))
    return torch.nested.nested_tensor_from_jagged(
        function(x.values()),
        x.offsets(),
        x.lengths(),
        x._ragged_idx,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )
