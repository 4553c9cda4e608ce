"""The model's own biases, trained along with an adapter (``bias="all"`` or ``"lora_only"``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class TrainedBiases:
    """Biases that an adapter trains in place, and their original values, which PEFT loses.

    Args:
        owners: maps paths in file keys to modules with a ``bias``.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        self.used = True
        first: dict[int, str] = {}
        # Maps every path to the first path with the same parameter: BERT's head has one bias in two modules.
        self._first = {path: first.setdefault(id(owner.bias), path) for path, owner in owners.items()}
        self._owners = {path: owners[path] for path in first.values()}
        # The values not in place now: the original ones while the trained ones are used, and the reverse.
        self._others = {path: owner.bias.detach().clone() for path, owner in self._owners.items()}

    @torch.no_grad()
    def use(self, used: bool) -> None:
        """Puts the trained values (``used``) or the original ones in place."""
        if used == self.used:
            return
        for path, owner in self._owners.items():
            other = self._others[path].to(owner.bias)
            self._others[path] = owner.bias.detach().clone()
            owner.bias.copy_(other)
        self.used = used

    def requires_grad_(self, requires_grad: bool) -> None:
        for owner in self._owners.values():
            owner.bias.requires_grad = requires_grad

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that the biases are in, whatever values they have now."""
        for owner in self._owners.values():
            yield owner.bias

    def originals(self) -> dict[int, nn.Parameter]:
        """The original values by parameter ``id``; empty if they are in place."""
        used = self._owners.items() if self.used else ()
        return {id(owner.bias): nn.Parameter(self._others[path].clone().to(owner.bias)) for path, owner in used}

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained values by their file keys."""
        values = {path: owner.bias for path, owner in self._owners.items()} if self.used else self._others
        return {f"{path}.bias": values[first] for path, first in self._first.items()}
