"""Counts the bytes of tensor storages as they are created and freed; on the meta device, without using memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(NamedTuple):
    """Largest number of bytes at one time, and the part of parameter gradients in it."""

    total: int
    gradients: int


class StorageTracker(TorchDispatchMode):
    """Counts all storages that operators create inside a ``with`` block, until they are freed.

    The value of any meta tensor is true: models ask whether a batch is free of padding, and whether every row holds one
    text.

    Args:
        existing: tensors whose storages do not count, such as weights.

    Attributes:
        live: current bytes.
        peaks: peak of every part of the step, by the names given to :meth:`begin`.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.existing = [tensor.untyped_storage() for tensor in existing]  # kept, so that no address is reused
        self.live = 0
        self.peaks: dict[str, Peak] = {}
        self._known: dict[int, object] = {storage._cdata: storage for storage in self.existing}
        self._gradients: dict[int, int] = {}  # by id(parameter)
        self.begin("")

    def begin(self, part: str) -> None:
        """Starts the part ``part`` of the step."""
        self.part = part
        self._note()

    def has_gradient(self, parameter: nn.Parameter) -> None:
        """Records that ``parameter.grad`` now exists."""
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
