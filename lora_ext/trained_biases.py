"""The model's own biases, trained along with an adapter (``bias="all"`` or ``"lora_only"``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class TrainedBiases:
    """Biases that an adapter trains in place, and their values of before: PEFT loses those.

    Args:
        owners: the modules, each with a ``bias``, by the path that keys in files have.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        self._owners = dict(owners)
        self.used = True
        self._others = {path: owner.bias.detach().clone() for path, owner in self._owners.items()}  # not in place now

    @torch.no_grad()
    def use(self, used: bool) -> None:
        """Whether the model has the trained values or its own."""
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

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained values by their keys in a file."""
        return {f"{path}.bias": owner.bias if self.used else self._others[path] for path, owner in self._owners.items()}
