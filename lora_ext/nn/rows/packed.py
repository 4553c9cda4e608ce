"""Rows that hold several sequences: each token of a batch, not each row, has an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.base_layer import is_conv1d
from lora_ext.nn.rows.choice import RowChoice

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters
    from lora_ext.nn.adapter_layer import AdapterLayer


class PackedChoice(RowChoice):
    """The adapters that the tokens of a batch use. Each name is for a segment of the tokens, counted row after row.

    ``rows`` of the base class has an entry for each segment.

    Attributes:
        lengths: the tokens of each segment.
        before: for each segment how many of its first tokens come before its adapter's invocation (aLoRA), or None.
        shape: the rows of the batch, and the tokens in each of them.
        kept: the tokens of each row that the output head gets, int64 ``[kept]``; None: all.
        head: the output head, without adapter layers.
    """

    def __init__(self, active: ActiveAdapters | None, names: Sequence[str], lengths: Sequence[int]) -> None:
        super().__init__(active, names)
        self.lengths = list(lengths)
        self.before: list[int] | None = None
        self.shape = 1, sum(lengths)
        self.kept: Tensor | None = None
        self.head: nn.Module | None = None

    def aligned(self, layer: AdapterLayer, x: Tensor) -> tuple[Tensor, int]:
        """Returns ``x`` and 1. A single row, such as the position ids of all rows of the batch, is repeated.

        Raises:
            ValueError: the first dimensions of ``x`` do not count the tokens of the batch.
        """
        rows, length = self.shape
        if rows > 1 and x.dim() > 1 and tuple(x.shape[:2]) == (1, length):
            x = x.expand(rows, *x.shape[1:])
        self._dims(layer, x)
        return x, 1

    def row_groups(self, present: tuple[str, ...], times: int, x: Tensor, layer: AdapterLayer) -> tuple[Tensor, int]:
        dims, is_kept = self._dims(layer, x)
        return self._placed(self.groups(present, times, x.device), is_kept), dims

    def token_groups(self, present: tuple[str, ...], times: int, x: Tensor, layer: AdapterLayer) -> Tensor:
        return self._active_groups(present, self.groups(present, times, x.device), x, layer)

    def slots_of(self, x: Tensor, times: int, layer: AdapterLayer) -> Tensor:
        return self._active_groups(None, self._slot_groups(times, x.device), x, layer)

    def _active_groups(self, key: tuple[str, ...] | None, groups: Tensor, x: Tensor, layer: AdapterLayer) -> Tensor:
        """Returns ``groups`` in the shape of the first dimensions of ``x``, with -1 for tokens before an invocation."""
        dims, is_kept = self._dims(layer, x)
        shape = x.shape[:dims]
        found = self._groups.get((key, shape, is_kept, x.device))
        if found is None:
            with torch.inference_mode(False):  # a later call may be recorded by autograd
                if self.before is not None:
                    groups = groups.masked_fill(self._are_before().to(x.device), -1)
                found = self._placed(groups, is_kept).view(shape)
            self._groups[key, shape, is_kept, x.device] = found
        return found

    def _are_before(self) -> Tensor:
        """Marks tokens that come before their segment's invocation: bool ``[tokens]``."""
        lengths, before = torch.tensor(self.lengths), torch.tensor(self.before)
        place = torch.arange(sum(self.lengths)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return place < before.repeat_interleave(lengths)

    def _placed(self, groups: Tensor, is_kept: bool) -> Tensor:
        """The groups of the tokens that a layer gets."""
        if not is_kept:
            return groups
        return groups.view(self.shape)[:, self.kept.to(groups.device)].flatten()

    def _dims(self, layer: AdapterLayer, x: Tensor) -> tuple[int, bool]:
        """Returns how many first dimensions of ``x`` count tokens, and whether these are the kept ones only."""
        rows, length = self.shape
        is_kept = self.kept is not None and innermost(layer) is self.head
        length = len(self.kept) if is_kept else length
        shape = tuple(x.shape)
        if shape[:2] == (rows, length):
            return 2, is_kept
        if shape[:1] == (rows * length,):
            return 1, is_kept
        raise ValueError(
            f"{type(layer).__name__}: adapter_lengths are for {rows} rows of {length} tokens, but the layer's input "
            f"has the shape {list(shape)}; leave this module out of the adapters, or pass a sequence for each row"
        )

    def _of_rows(self, numbers, times: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):
            groups = super()._of_rows(numbers, 1, torch.device("cpu"))
            return groups.repeat_interleave(torch.tensor(self.lengths)).to(device)


_TOKENWISE = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)


def is_tokenwise(module: nn.Module) -> bool:
    """Returns whether ``module`` is known to compute each token by itself, from the token's features only."""
    if isinstance(module, nn.Sequential):
        return all(map(is_tokenwise, module))
    return isinstance(module, _TOKENWISE) or is_conv1d(module) or type(module).__name__.endswith("RMSNorm")
