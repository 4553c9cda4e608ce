"""Adapters that a pool has read, kept in host memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

import torch

from lora_ext.adapters.pool_files import PoolAdapter


class HostCache:
    """Keeps the adapters that were used last; several threads may use it.

    Attributes:
        adapters: by name, the least recently used first.
        nbytes: their size.
    """

    def __init__(self, limit: int, is_pinned: bool) -> None:
        self.adapters: OrderedDict[str, PoolAdapter] = OrderedDict()
        self.nbytes = 0
        self._limit, self._is_pinned, self._lock = limit, is_pinned, threading.Lock()

    def get(self, name: str) -> PoolAdapter | None:
        with self._lock:
            adapter = self.adapters.get(name)
            if adapter is not None:
                self.adapters.move_to_end(name)
            return adapter

    def keep(self, name: str, adapter: PoolAdapter) -> None:
        """Keeps an adapter, if there is room for it."""
        size = adapter.nbytes
        if size > self._limit:
            return
        if self._is_pinned:
            adapter = adapter.copied(torch.Tensor.pin_memory)
        with self._lock:
            self._forget(name)
            while self.nbytes + size > self._limit:
                self._forget(next(iter(self.adapters)))
            self.adapters[name] = adapter
            self.nbytes += size

    def forget(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self._forget(name)

    def _forget(self, name: str) -> None:
        adapter = self.adapters.pop(name, None)
        if adapter is not None:
            self.nbytes -= adapter.nbytes
