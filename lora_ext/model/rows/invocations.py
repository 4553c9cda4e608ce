"""Finds where the adapters of a batch begin to act (aLoRA): the last occurrence of their invocation tokens in each row.

PEFT's rules: the adapter acts on the invocation tokens and on all tokens after them, padding too. In a row without them
it does not act. ``generate`` looks at the prompt only. A caller may say the places itself, by PEFT's argument
``alora_offsets``: for each row the number of last tokens on which the adapter acts, or None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._common.printable import shown
from lora_ext.model.rows.arguments import OFFSETS, token_ids, tokens_in_row
from lora_ext.nn.rows.active_tokens import ActiveTokens
from lora_ext.nn.rows.choice import BASE

if TYPE_CHECKING:
    from lora_ext.model.bare_model import BareModel

Invocations = Mapping[str, tuple[int, ...]]


class InvocationLimits(NamedTuple):
    """The limits that a model sets to invocation tokens.

    Attributes:
        encoder_decoder: the class of a model with an encoder and a decoder, or "".
        num_tokens: rows of the input embedding; None: not known.
    """

    encoder_decoder: str
    num_tokens: int | None

    @classmethod
    def of(cls, bare: BareModel) -> InvocationLimits:
        has_both = getattr(getattr(bare.root, "config", None), "is_encoder_decoder", False)
        weight = getattr(bare.embedding, "weight", None)
        return cls(type(bare.root).__name__ if has_both else "", None if weight is None else len(weight))

    def problem(self, tokens: Sequence[int]) -> str | None:
        """Returns why the model cannot have these invocation tokens, or None."""
        if self.encoder_decoder:
            return (
                f"alora_invocation_tokens is set, but {self.encoder_decoder} has an encoder and a decoder, which read "
                "different tokens; aLoRA is for decoders alone"
            )
        if self.num_tokens is None or not (wrong := [token for token in tokens if token >= self.num_tokens]):
            return None
        return (
            f"alora_invocation_tokens has {shown(wrong)}, but the model's input embedding has {self.num_tokens} "
            "tokens; resize the embedding first (resize_token_embeddings)"
        )


def find_starts(
    values: Mapping[str, Any], names: Sequence[str], invocations: Invocations, caller: str
) -> list[int | None]:
    """Finds the first active token of each row; None: the adapter does not act. 0 for adapters that are not aLoRA.

    Args:
        values: the arguments of the call, as :func:`~lora_ext.model.rows.arguments.values_of` returns them.
        names: the adapter of each row.
        invocations: by adapter name.

    Raises:
        ValueError: the tokens are not known, or ``alora_offsets`` does not fit.
    """
    ids, given = token_ids(values), values.get(OFFSETS)
    if given is not None:
        return _starts_given(given, names, invocations, tokens_in_row(values, caller), caller)
    first = next(name for name in names if name in invocations)
    if ids is None:
        raise ValueError(
            f"{caller}: the adapter {first!r} acts from its invocation tokens on (aLoRA), but the call has no "
            f"input_ids [rows, tokens]; pass them, or {OFFSETS}: for each row on how many last tokens it acts, or None"
        )
    _check_one_sequence_a_row(values, first, caller)
    starts: list[int | None] = [0] * len(names)
    for name in dict.fromkeys(names):
        if name in invocations:
            rows = [i for i, chosen in enumerate(names) if chosen == name]
            for i, start in zip(rows, last_occurrences(ids[rows], invocations[name]), strict=True):
                starts[i] = start
    return starts


def active_tokens(
    starts: Sequence[int | None], times: int, values: Mapping[str, Any], first: int, caller: str
) -> ActiveTokens:
    """The tokens of a call on which the adapters act.

    Args:
        starts: as :func:`find_starts` returns them.
        times: consecutive rows of the batch for each start.
        first: the position of the call's first token.
    """
    length = tokens_in_row(values, caller)
    before = [length if start is None else min(max(start - first, 0), length) for start in starts]
    kept = values.get("logits_to_keep")
    kept = min(kept, length) if isinstance(kept, int) else None
    return ActiveTokens([n for n in before for _ in range(times)], length, kept)


def past_tokens(values: Mapping[str, Any], prompt: int, caller: str) -> int:
    """Returns how many tokens of the sequence a step of ``generate`` has computed before: those in its cache.

    Args:
        prompt: the number of tokens in the prompt. A step of one token comes after all of them: caches that hold states
            (Mamba, RWKV) do not tell how many tokens they have seen.

    Raises:
        ValueError: such a cache, and a step of several tokens, but not of the whole prompt.
    """
    for value in values.values():
        if callable(length := getattr(value, "get_seq_length", None)):
            with suppress(ValueError):  # a cache of states only
                return int(length())
    length = tokens_in_row(values, caller)
    mask = values.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > length:
        return mask.shape[1] - length
    if length >= prompt:
        return 0
    if length == 1:
        return prompt  # an active token, or one of a row without an invocation: which of them makes no difference
    raise ValueError(
        f"{caller}: {length} of the prompt's {prompt} tokens, and a cache that does not tell how many it holds; aLoRA "
        "needs that: pass use_cache=False, or no prefill_chunk_size"
    )


def last_occurrences(ids: Tensor, tokens: tuple[int, ...]) -> list[int | None]:
    """Finds where ``tokens`` occur for the last time in each row of ``ids [rows, length]``; None: nowhere."""
    if ids.shape[1] < len(tokens):
        return [None] * len(ids)
    if ids.is_meta or type(ids).__name__ == "FakeTensor":  # importing the class takes 100 ms
        raise ValueError(
            f"adapters with invocation tokens (aLoRA) look for them in input_ids, which have no values here; "
            f"pass {OFFSETS}"
        )
    wanted = torch.tensor(tokens, device=ids.device)
    is_here = (ids.unfold(1, len(tokens), 1) == wanted).all(-1)
    places = torch.arange(1, is_here.shape[1] + 1, device=ids.device)
    return [place - 1 if place else None for place in (is_here * places).amax(1).tolist()]


def _starts_given(
    given: Any, names: Sequence[str], invocations: Invocations, length: int, caller: str
) -> list[int | None]:
    offsets = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(offsets, list | tuple) or len(offsets) != len(names):
        raise ValueError(f"{caller}: {OFFSETS} is {offsets!r}, want a number or None for each of the {len(names)} rows")
    for offset in offsets:
        if offset is not None and (not isinstance(offset, int) or offset < 0):
            raise ValueError(f"{caller}: {OFFSETS} has the entry {offset!r}, want a number of tokens, or None")
    return [
        (max(length - offset, 0) if offset else None) if name in invocations else 0
        for name, offset in zip(names, offsets, strict=True)
    ]


def _check_one_sequence_a_row(values: Mapping[str, Any], name: str, caller: str) -> None:
    """Refuses rows that are packed of several sequences: only one of them would find its invocation."""
    positions = values.get("position_ids")
    is_packed = any(key.startswith("cu_seq") and value is not None for key, value in values.items())
    if isinstance(positions, Tensor) and positions.dim() == 2 and not is_packed:
        begins = positions.diff() < 0
        mask = values.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == positions.shape:
            begins &= (mask[:, :-1] != 0) & (mask[:, 1:] != 0)  # padding on either side begins no sequence
        is_packed = bool(begins.any())
    if is_packed:
        raise ValueError(
            f"{caller}: the rows are packed of several sequences, but the adapter {name!r} acts from its invocation "
            "tokens on (aLoRA), which are looked for once in a row; pass a sequence for each row, or adapter_names and "
            "adapter_lengths, the number of tokens of each name"
        )


def are_invoked(names: Sequence[str], invocations: Invocations) -> bool:
    """Returns whether one of the adapters acts from its invocation tokens on."""
    return bool(invocations) and any(name != BASE and name in invocations for name in names)
