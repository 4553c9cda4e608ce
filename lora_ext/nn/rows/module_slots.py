"""Storage for modules of a pool that adapters train in full, such as classification heads: one in each slot."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class ModuleSlots:
    """The parameters and buffers of many copies of a module. Memory is allocated once and never moves.

    A slot is written while no call uses it. Copies of the layer share the storage, as the pool fills it for all of
    them.

    Attributes:
        stacks: by name in the module's ``state_dict``, its tensor for every slot: ``[slots, ...]``.
    """

    def __init__(self, module: nn.Module, slots: int) -> None:
        self._module = module
        self._copies: dict[int, nn.Module] = {}
        self._filled: set[int] = set()
        with torch.inference_mode(False):
            self.stacks = {
                name: torch.empty(slots, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
                for name, tensor in module_tensors(module).items()
            }

    @torch.no_grad()
    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Fills a slot with the tensors of a module's ``state_dict``, of any dtype and device."""
        for name, stack in self.stacks.items():
            stack[slot].copy_(tensors[name])
        if slot not in self._copies:
            self._copies[slot] = self._copy(slot, self._module)
        self._filled.add(slot)

    def _copy(self, slot: int, module: nn.Module, is_converted: bool = False) -> nn.Module:
        """``module`` with the slot's tensors in place of its own, or with copies converted to its dtypes and device."""
        tensors: dict[int, Any] = {}
        for name, own in module_tensors(module).items():
            tensor = self.stacks[name][slot].to(own) if is_converted else self.stacks[name][slot]
            tensors[id(own)] = nn.Parameter(tensor, False) if isinstance(own, nn.Parameter) else tensor
        return copy.deepcopy(module, tensors)

    def clear(self, slot: int) -> None:
        self._filled.discard(slot)

    def modules(self, slots: Mapping[str, int], base: nn.Module, training: bool) -> dict[str, nn.Module]:
        """The modules in ``slots``, by name, in training mode or not; without adapters that have none.

        Args:
            base: the model's own module. If the model was converted or moved since the pool was made, the results are
                copies that were, too, of this call only.
        """
        is_converted = any(self._differs(name, tensor) for name, tensor in module_tensors(base).items())
        modules = {}
        for name, slot in slots.items():
            if slot in self._filled:
                module = self._copy(slot, base, True) if is_converted else self._copies[slot]
                modules[name] = module if module.training == training else module.train(training)
        return modules

    def _differs(self, name: str, tensor: Tensor) -> bool:
        stack = self.stacks[name]
        return stack.dtype != tensor.dtype or stack.device != tensor.device

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleSlots:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model whose layers serve an AdapterPool cannot be pickled; call pool.close() first")


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that an adapter file has of ``module``, by their names in it."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
