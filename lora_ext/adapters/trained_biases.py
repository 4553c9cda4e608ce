"""The model's own biases, trained along with an adapter (``bias="all"`` or ``"lora_only"``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_ext._common.interrupts import uninterrupted


class TrainedBiases:
    """Biases that an adapter trains in place, and their values of before: PEFT loses those.

    Args:
        owners: the modules, each with a ``bias``, by the path that keys in files have.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        self.used = True
        first: dict[int, str] = {}
        # BERT's head has one bias in two modules: each path, and the first with that parameter.
        self._first = {path: first.setdefault(id(owner.bias), path) for path, owner in owners.items()}
        self._owners = {path: owners[path] for path in first.values()}
        self._others = {path: owner.bias.detach().clone() for path, owner in self._owners.items()}  # not in place now

    @torch.no_grad()
    def use(self, used: bool) -> None:
        """Whether the model has the trained values or its own."""
        if used == self.used:
            return
        with uninterrupted():
            for path, owner in self._owners.items():
                other = self._others[path].to(owner.bias)
                self._others[path] = owner.bias.detach().clone()
                owner.bias.copy_(other)
            self.used = used

    def requires_grad_(self, requires_grad: bool) -> None:
        for owner in self._owners.values():
            owner.bias.requires_grad = requires_grad

    def owns(self, parameter: Tensor) -> bool:
        return any(owner.bias is parameter for owner in self._owners.values())

    def originals(self) -> dict[int, nn.Parameter]:
        """The model's own values, by the ``id`` of the parameter that has others now."""
        used = self._owners.items() if self.used else ()
        return {id(owner.bias): nn.Parameter(self._others[path].clone().to(owner.bias)) for path, owner in used}

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained values by their keys in a file."""
        values = {path: owner.bias for path, owner in self._owners.items()} if self.used else self._others
        return {f"{path}.bias": values[first] for path, first in self._first.items()}
