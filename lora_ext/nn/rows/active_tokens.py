"""Adapters that act from an invocation on (aLoRA): on which tokens of a model's call, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_ext.nn.adapter_layer import AdapterLayer


class ActiveTokens:
    """The tokens of a call on which the chosen adapters act: in each row those from a position on.

    Attributes:
        before: for each row of the batch, how many of its tokens come before that position: 0 to ``length``.
        length: tokens of a row.
        kept: how many last tokens of each row the output head gets, or ``length`` (Transformers' ``logits_to_keep``).
    """

    def __init__(self, before: Sequence[int], length: int, kept: int | None = None) -> None:
        self.before, self.length, self.kept = list(before), length, kept or length
        self.are_all = not any(self.before)
        self._masks: dict[tuple, Tensor] = {}

    def groups(self, layer: AdapterLayer, groups: Tensor, x: Tensor) -> Tensor:
        """The groups of the tokens of a layer's input, or of its rows if all tokens of a row are alike.

        Args:
            layer: for messages.
            groups: of the rows of ``x``, int64 ``[rows]``; -1: none.
            x: ``[batch, tokens, ...]``, or ``[batch * tokens, features]``.

        Raises:
            ValueError: the dimensions of ``x`` are others.
        """
        if self.are_all:
            return groups
        mask = self._mask(layer, x)
        return torch.where(mask, groups.view(-1, *[1] * (mask.dim() - 1)), -1)

    def _mask(self, layer: AdapterLayer, x: Tensor) -> Tensor:
        """Returns whether a token is active: bool ``[batch, tokens]``, ``[batch, 1]`` or ``[batch * tokens]``."""
        rows, shape = len(self.before), tuple(x.shape[:-1])
        lengths = (self.length, self.kept)
        for length in lengths:
            if (x.dim() > 2 and shape[:2] == (rows, length)) or shape == (rows * length,):
                break
        else:
            raise ValueError(
                f"{type(layer).__name__}: an adapter acts from its invocation tokens on (aLoRA), but the layer's input "
                f"has the shape {list(x.shape)}, which is no [{rows}, {self.length}, features] with a token for each "
                "of the model's input_ids; leave this module out of target_modules"
            )
        key = length, len(shape) > 1, x.device
        if (mask := self._masks.get(key)) is None:
            cut = self.length - length  # tokens that the layer does not get
            with torch.inference_mode(False):  # a later call may be recorded by autograd
                first = torch.tensor([[max(n - cut, 0)] for n in self.before], device=x.device)
                mask = torch.arange(length, device=x.device) >= first
                mask = mask if len(shape) > 1 else mask.flatten()
            self._masks[key] = mask
        return mask
