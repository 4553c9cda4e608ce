"""How many rows the arguments of a model's call have, and how many rows of a layer's input belong to one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def first_rows(values: Mapping[str, Any], main: str | None) -> tuple[str, Tensor] | None:
    """Returns the name and the value of the argument that says how many rows a batch has, or None."""
    tensors = dict(_tensors(values))
    for name in (main, "input_ids", "decoder_input_ids", "inputs_embeds", "sample", "hidden_states", *tensors):
        if name in tensors:
            return name, tensors[name]
    return None


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.dim():
                yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


def token_multiples(values: Mapping[str, Any], rows: int, times: int) -> frozenset[int]:
    """Returns how many rows of a layer's input may belong to one name: 1, ``times``, or all their tokens.

    Args:
        values: the arguments of the model's forward.
        rows: of its batch.
        times: the rows of the batch that belong to one name.
    """
    lengths = {tensor.shape[1] for _, tensor in _tensors(values) if tensor.dim() > 1 and tensor.shape[0] == rows}
    return frozenset((1, times, *(times * length for length in lengths)))
