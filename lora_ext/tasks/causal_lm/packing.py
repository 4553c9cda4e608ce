"""Puts several texts into one row, and makes batches where no text sees another."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext.tasks.causal_lm.rendering import IGNORED


def pack(rows: Sequence[dict[str, Sequence[int]]], max_length: int) -> list[dict[str, Sequence[int]]]:
    """Packs rows of at most ``max_length`` tokens into few, by best fit, longest first.

    Position ids restart at 0 with every text. Transformers finds the texts by them and builds a block-diagonal mask, if
    there is no attention mask and no cache (``masking_utils.find_packed_sequence_indices``).
    """
    packs: list[list[dict[str, Sequence[int]]]] = []
    room: list[tuple[int, int]] = []  # (free tokens, index of the pack), sorted
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            packs.append([])
            free, index = max_length, len(packs) - 1
        else:
            free, index = room.pop(at)
        packs[index].append(row)
        bisect.insort(room, (free - length, index))
    return [
        {
            "input_ids": array("i", (token for row in texts for token in row["input_ids"])),
            "labels": array("i", (label for row in texts for label in row["labels"])),
            "position_ids": array("i", (position for row in texts for position in range(len(row["input_ids"])))),
        }
        for texts in packs
    ]


class Collator:
    """Pads rows on the right to one length.

    Rows with position ids get no attention mask: their padding is one more text, which no label counts.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding  # token id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "labels": []}
        last = "position_ids" if "position_ids" in rows[0] else "attention_mask"
        batch[last] = []
        for row in rows:
            length = len(row["input_ids"])
            missing = longest - length
            batch["input_ids"].append([*row["input_ids"], *[self.padding] * missing])
            batch["labels"].append([*row["labels"], *[IGNORED] * missing])
            if last == "position_ids":
                batch[last].append([*row["position_ids"], *range(missing)])
            else:
                batch[last].append([1] * length + [0] * missing)
        return {name: torch.tensor(values) for name, values in batch.items()}
