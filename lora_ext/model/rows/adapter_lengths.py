"""Calls whose rows hold several sequences: ``adapter_lengths`` says how many tokens belong to each adapter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.model.bare_model import output_head
from lora_ext.model.rows.arguments import LENGTHS, OFFSETS, first_rows, token_ids
from lora_ext.model.rows.invocations import Invocations, last_occurrences
from lora_ext.nn.rows.packed import PackedChoice


def checked_lengths(lengths: Any, names: Sequence[str], caller: str) -> list[int]:
    """``lengths`` as a list. TypeError, ValueError: it has no number of tokens for each of ``names``."""
    values = lengths
    if isinstance(lengths, Tensor) and lengths.dim() == 1:
        values = lengths.tolist()
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise TypeError(
            f"{caller}: {LENGTHS} is {_shown(lengths)}, want a list or a tensor [names] with the number of tokens of "
            "each name"
        )
    if len(values) != len(names):
        raise ValueError(
            f"{caller}: {LENGTHS} has {len(values)} entries, but adapter_names has {len(names)} names; pass the number "
            "of tokens of each name"
        )
    if (least := min(values)) < 0:
        raise ValueError(f"{caller}: {LENGTHS} has the entry {least}, want numbers of tokens")
    return list(values)


def _shown(value: Any) -> str:
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
    return f"of type {type(value).__name__}{shape}"


def sequence_lengths(values: Mapping[str, Any], names: int) -> list[int] | None:
    """The tokens of each sequence that the call's rows hold, if it says so and they are as many as ``names``.

    Calls say so by ``cu_seq_lens_q``, or by ``position_ids`` that begin again.
    """
    ends, positions, lengths = values.get("cu_seq_lens_q"), values.get("position_ids"), None
    if isinstance(ends, Tensor) and ends.dim() == 1:
        lengths = ends.diff().tolist()
    elif isinstance(positions, Tensor) and positions.dim() == 2:
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions.diff() != 1
        places = begins.flatten().nonzero().flatten().tolist()
        lengths = [end - begin for begin, end in zip(places, [*places[1:], positions.numel()], strict=True)]
    return lengths if lengths is not None and len(lengths) == names else None


def fit(choice: PackedChoice, root: nn.Module, values: Mapping[str, Any], caller: str) -> None:
    """Notes the shape of a call's batch in ``choice``. ValueError: the lengths are for another number of tokens."""
    first = first_rows(values, getattr(root, "main_input_name", None))
    if first is None:
        raise ValueError(f"{caller}: {LENGTHS} needs a call with a tensor of tokens")
    argument, tensor = first
    shape = tensor.shape[: tensor.dim() - tensor.is_floating_point()][:2]  # without features
    rows, length = (1, *shape) if len(shape) == 1 else shape
    if sum(choice.lengths) != rows * length:
        raise ValueError(
            f"{caller}: {LENGTHS} is for {sum(choice.lengths)} tokens, but {argument} has {rows * length}, "
            f"{list(shape)}; padding belongs to '__base__'"
        )
    choice.shape, choice.kept, choice.head = (rows, length), None, None
    kept = values.get("logits_to_keep")
    if isinstance(kept, int):
        kept = torch.arange(max(length - kept, 0), length) if kept else None
    if isinstance(kept, Tensor):
        kept = kept.nonzero().flatten() if kept.dtype is torch.bool else kept
        choice.kept, choice.head = kept, output_head(root)


def find_invocations(
    choice: PackedChoice, names: Sequence[str], invocations: Invocations, values: Mapping[str, Any], caller: str
) -> None:
    """Notes which tokens come before the invocation in their segment.

    Args:
        names: the adapter of each segment.

    Raises:
        ValueError: the call does not have all tokens of the sequences.
    """
    first = next(name for name in names if name in invocations)
    ids = token_ids(values)
    cached = any(callable(length := getattr(cache, "get_seq_length", None)) and length() for cache in values.values())
    if ids is None or cached or values.get(OFFSETS) is not None:
        raise ValueError(
            f"{caller}: the adapter {first!r} acts from its invocation tokens on (aLoRA), and packed rows need "
            f"whole sequences; pass input_ids, and neither a cache that holds tokens nor {OFFSETS}"
        )
    choice.before = []
    for name, tokens in zip(names, ids.flatten().split(choice.lengths), strict=True):
        start = last_occurrences(tokens[None], invocations[name])[0] if name in invocations else 0
        choice.before.append(len(tokens) if start is None else start)
