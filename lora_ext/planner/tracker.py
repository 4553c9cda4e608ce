"""Counts the memory of tensors by their storages, as they come and go; on the meta device, without the memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(NamedTuple):
    """The most bytes at one time, and how many of these were gradients of parameters."""

    total: int
    gradients: int


class StorageTracker(TorchDispatchMode):
    """Within ``with``: the bytes of all storages that operators make, each from its first tensor to its last.

    Asked for a value of a meta tensor, it says yes: models ask whether a batch is free of padding, and whether its
    texts are one to a row.

    Args:
        existing: tensors that are there anyway, as weights are; their storages do not count.

    Attributes:
        live: bytes now.
        peaks: the most in each part of the step, by the names given to :meth:`begin`.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.existing = [tensor.untyped_storage() for tensor in existing]  # kept, so that no address is used again
        self.live = 0
        self.peaks: dict[str, Peak] = {}
        self._known: dict[int, object] = {storage._cdata: storage for storage in self.existing}
        self._gradients: dict[int, int] = {}  # by id(parameter)
        self.begin("")

    def begin(self, part: str) -> None:
        """What follows belongs to ``part``."""
        self.part = part
        self._note()

    def has_gradient(self, parameter: nn.Parameter) -> None:
        """The gradient of ``parameter`` is now in its ``grad``."""
        self._gradients[id(parameter)] = parameter.grad.nbytes
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self.live += size

        def gone(_: object) -> None:
            self.live -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, gone)
        self._note()

    def _note(self) -> None:
        if self.live >= self.peaks.get(self.part, (-1,))[0]:
            self.peaks[self.part] = Peak(self.live, sum(self._gradients.values()))
