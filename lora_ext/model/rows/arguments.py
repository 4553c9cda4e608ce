"""The arguments of a model's call: those about adapters, and those that say how many rows and tokens it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

NAMES = "adapter_names"
LENGTHS = "adapter_lengths"
OFFSETS = "alora_offsets"


def without_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that the model itself takes."""
    return {name: value for name, value in kwargs.items() if name not in (NAMES, LENGTHS, OFFSETS)}


def values_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all arguments by name; positional ones by :func:`position`."""
    return {position(i): value for i, value in enumerate(args, start=1)} | dict(kwargs)


def position(i: int) -> str:
    """The name of the ``i``-th positional argument, from 1 on."""
    return f"argument {i}"


def token_ids(values: Mapping[str, Any]) -> Tensor | None:
    for name in ("input_ids", "inputs", position(1)):
        ids = values.get(name)
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            return ids
    return None


def tokens_in_row(values: Mapping[str, Any], caller: str) -> int:
    """Returns the number of tokens in a row of a call. ValueError: it has neither input_ids nor inputs_embeds."""
    ids = token_ids(values)
    tokens = ids if ids is not None and ids.shape[1] else values.get("inputs_embeds")
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{caller}: aLoRA needs input_ids or inputs_embeds, which tell how many tokens a row has")
    return tokens.shape[1]


def first_rows(values: Mapping[str, Any], main: str | None) -> tuple[str, Tensor] | None:
    """Returns the name and the value of the argument that says how many rows a batch has, or None."""
    tensors = dict(_tensors(values))
    for name in (main, "input_ids", "decoder_input_ids", "inputs_embeds", "sample", "hidden_states", *tensors):
        if name in tensors:
            return name, tensors[name]
    return None


def media_of(values: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """Returns the name and the value of the first argument that holds images or sounds, of all rows of a batch."""
    return next((held for held in _tensors(values) if held[0].startswith(_MEDIA)), None)


_MEDIA = "pixel_values", "image_pixel_values", "input_features", "input_values", "audio"


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
