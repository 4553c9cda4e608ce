"""The place of a layer in a model: its block, and the kind of layer that it is there."""

from __future__ import annotations

import re
from collections.abc import Sequence


def places(names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Returns the block and the kind of each layer: 3 and ``mlp.up_proj`` for ``model.layers.3.mlp.up_proj``.

    The first number in a path counts the blocks; further ones, as those of experts, become ``*``. Where layers of one
    kind are in blocks of several lists, as in encoder and decoder, the list's name is part of the kind. Without a
    number: None and the whole name.
    """
    split: dict[str, tuple[str, int | None, str]] = {}
    for name in names:
        parts = re.sub(r"\[\d+\]$", "", name).split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            split[name] = "", None, ".".join(parts)
        else:
            kind = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
            split[name] = ".".join(parts[:at]), int(parts[at]), ".".join(kind) or "*"
    lists: dict[str, set[str]] = {}
    for blocks, _, kind in split.values():
        lists.setdefault(kind, set()).add(blocks)
    return {
        name: (block, f"{blocks}.*.{kind}" if len(lists[kind]) > 1 else kind)
        for name, (blocks, block, kind) in split.items()
    }
