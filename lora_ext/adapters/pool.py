"""Thousands of adapters on disk and many in memory, for batches whose rows name them."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext.adapters.pool_files import LayerShape, PoolShape, read_adapter
from lora_ext.adapters.pool_host_cache import HostCache
from lora_ext.adapters.pool_names import PoolNames
from lora_ext.adapters.pool_slots import SlotsInUseError, SlotTable
from lora_ext.config import LoraConfig
from lora_ext.injection.pool_layers import attach_pool, detach_pool, pool_layers
from lora_ext.model.bare_model import BareModel, root_module
from lora_ext.model.rows.invocations import InvocationLimits
from lora_ext.nn.rows.module_slots import module_tensors


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """The adapters that a pool holds, and counts of its work.

    Attributes:
        slots: how many adapters it can hold.
        slot_bytes: bytes of one slot; ``slots * slot_bytes`` is the storage.
        resident: adapters that have a slot.
        pinned, in_use: those of them that are pinned; that running calls use.
        host: adapters in the host cache, and ``host_bytes``, its size.
        hits, misses: adapters that calls found in a slot, or not.
        loads, load_seconds: adapters that were read, and the time of all threads together.
        evictions: adapters that gave their slot to another one.
        failures: adapters that could not be loaded.
        waits: calls that waited for slots that other calls used.
    """

    slots: int
    slot_bytes: int
    resident: int
    pinned: int
    in_use: int
    host: int
    host_bytes: int
    hits: int
    misses: int
    loads: int
    load_seconds: float
    evictions: int
    failures: int
    waits: int


class AdapterPool:
    """Adapters in slots of shared storage, read from PEFT directories when rows name them.

    ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` then take names of the pool.
    An adapter is loaded when a call needs it, and has a slot at least until the call ends; the least recently used one
    that no call uses makes room. Loading moves nothing that a running call uses. All methods may be called by several
    threads at the same time.

    A pool holds low-rank updates of linear layers (also quantised ones) and modules that adapters train in full
    (classification heads), for inference. Adapters of the model itself (:func:`lora_ext.inject`,
    :func:`lora_ext.load_adapter`) stay, and come first where a name is both.

    Args:
        model: the model, bare or injected; on the device that computes. It is frozen as by :func:`lora_ext.inject`.
        directory: adapters are its subdirectories, by name; None: only those of :meth:`add`.
        target_modules: the layers that an adapter of the pool can adapt, as in :class:`~lora_ext.LoraConfig`.
        modules_to_save: the modules that an adapter of the pool can train in full, as in
            :class:`~lora_ext.LoraConfig`. A row whose adapter has none of its own gets the model's.
        r: the largest rank of an adapter. Each slot has this rank.
        max_bytes: of the storage on the model's device. The memory is reserved at once; an operating system gives pages
            of host memory as slots are filled.
        dtype: of the factors; None: that of the layers, or float32 if that has 16 bits.
        host_bytes: of a cache of read adapters in host memory, pinned if the model is on a GPU, which saves reading
            them again; 0: none.
        timeout: seconds that a call waits for slots which other calls use.

    Raises:
        ValueError, TypeError: as :func:`lora_ext.inject`; or the model has a pool already, ``max_bytes`` is less than a
            slot, targets are no linear layers, or ``timeout`` or ``host_bytes`` is negative. The model is then
            unchanged.
    """

    @checked
    @one_at_a_time
    def __init__(
        self,
        model: nn.Module,
        directory: str | os.PathLike[str] | None = None,
        *,
        target_modules: str | Iterable[str],
        modules_to_save: Iterable[str] | None = None,
        r: int,
        max_bytes: int,
        dtype: torch.dtype | None = None,
        host_bytes: int = 0,
        timeout: float = 60.0,
    ) -> None:
        for option, value in (("timeout", timeout), ("host_bytes", host_bytes)):
            if not value >= 0:
                raise ValueError(f"AdapterPool: {option} is {value}, want 0 or more")
        self._names = PoolNames(directory)
        config = LoraConfig(r=r, target_modules=target_modules, modules_to_save=modules_to_save)
        layers = pool_layers(model, config)
        shapes = {path: LayerShape(layer.in_features, layer.out_features) for path, layer in layers.found.items()}
        dtypes = layers.dtypes if dtype is None else dict.fromkeys(shapes, dtype)
        slot_bytes = sum(
            r * (shape.in_features + shape.out_features) * dtypes[path].itemsize + 16 for path, shape in shapes.items()
        )
        modules = {path: module_tensors(layer.base_layer) for path, layer in layers.trained.items()}
        slot_bytes += sum(tensor.nbytes for tensors in modules.values() for tensor in tensors.values())
        slots = max_bytes // slot_bytes
        if slots < 1:
            raise ValueError(
                f"AdapterPool: max_bytes is {max_bytes}, but one slot of rank {r} takes {slot_bytes}; raise max_bytes, "
                "or choose a smaller r or fewer target_modules"
            )
        bare = BareModel(root_module(model))
        head = next((path for path, module in bare.modules.items() if module is bare.head), None)
        self._shape = PoolShape(shapes, r, modules, InvocationLimits.of(bare), head)
        self._timeout, self._slot_bytes = timeout, slot_bytes
        self._table = SlotTable(slots, self._load)
        self._lock = threading.Lock()  # of what follows
        self._loads, self._load_seconds = 0, 0.0
        self._invocations: dict[str, tuple[int, ...]] = {}
        self._prefetcher: ThreadPoolExecutor | None = None
        self._prefetcher_process = 0
        self._slots, self._modules = attach_pool(model, layers, self, slots, r, dtypes)
        self._model = weakref.ref(root_module(model))
        self._host = HostCache(host_bytes, is_pinned=any(held.lora_A.is_cuda for held in self._slots.values()))

    # --- names -------------------------------------------------------------------------------------------------------

    @checked
    def add(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Makes the adapter in ``directory`` known as ``name``. It is read when a call needs it.

        Raises:
            ValueError: the name is taken, also by a subdirectory; it is empty or ``"__base__"``.
            FileNotFoundError: there is no adapter in ``directory``.
            RuntimeError: a running call uses an adapter of this name whose directory is gone.
        """
        self._names.check_new(name, directory)  # looks at the disk, so without the lock
        with self._table.changed:  # no call finds an adapter that had this name before
            self.evict(name)
            self._names.add(name, directory)

    @checked
    def remove(self, name: str) -> None:
        """Forgets a name of :meth:`add` and frees its slot. RuntimeError: it is in use. KeyError: it is not known."""
        self._names.check_added(name)
        with self._table.changed:  # no call loads it again in between
            self.evict(name)
            self._names.forget(name)

    def names(self) -> list[str]:
        """The known names: those of :meth:`add` and the subdirectories that hold an adapter; reads the directory."""
        return self._names.all()

    def resident(self) -> list[str]:
        """The names that have a slot, the least recently used first."""
        with self._table.changed:
            return list(self._table.entries)

    def knows(self, name: str) -> bool:
        """Returns whether the pool holds the adapter, or can find it."""
        return self._holds(name) or self._names.path_of(name) is not None

    def check_known(self, names: Iterable[str], caller: str, adapters_of_model: Iterable[str] = ()) -> None:
        """Checks that the pool holds the adapters, or can find them. KeyError: names the known ones.

        Args:
            adapters_of_model: adapters of the model itself, for the message.
        """
        self._names.check_known((name for name in names if not self._holds(name)), caller, adapters_of_model)

    def _holds(self, name: str) -> bool:
        return name in self._table.entries or name in self._host.adapters

    # --- slots -------------------------------------------------------------------------------------------------------

    def acquire(self, names: Sequence[str]) -> dict[str, int]:
        """Loads ``names`` and returns their slots, which they keep until :meth:`release`. For the model's calls."""
        self.check_known(names, "AdapterPool")
        return self._table.acquire(names, self._timeout)

    def try_acquire(self, name: str) -> bool:
        """Acquires the slot of one adapter without waiting. False: other calls use all slots."""
        self.check_known((name,), "AdapterPool")
        try:
            self._table.acquire((name,), None)
        except SlotsInUseError:
            return False
        return True

    def content(self, name: str) -> object:
        """Stands for what is in the slot of ``name``: another object when its files were read again."""
        return self._table.entries.get(name)

    def release(self, names: Sequence[str]) -> None:
        self._table.release(names)

    def invocations(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Returns the invocation tokens of those of ``names`` that are aLoRA; the names must be acquired."""
        with self._lock:
            return {name: self._invocations[name] for name in names if name in self._invocations}

    @checked
    def pin(self, *names: str) -> None:
        """Loads the adapters and keeps them until :meth:`unpin`, which needs one call for each of ``pin``.

        Raises:
            KeyError: a name is not known.
            RuntimeError: other pinned adapters leave too few slots. Nothing is pinned then.
            OSError, ValueError: an adapter cannot be read, or does not fit.
        """
        names = tuple(dict.fromkeys(names))
        self.check_known(names, "AdapterPool")
        self.acquire(names)
        self._table.pin(names, 1)

    @checked
    def unpin(self, *names: str) -> None:
        """Undoes :meth:`pin`. KeyError: a name is not pinned; nothing is changed."""
        names = tuple(dict.fromkeys(names))
        with self._table.changed:
            pinned = sorted(name for name, entry in self._table.entries.items() if entry.pins)
            for name in names:
                if name not in pinned:
                    raise KeyError(f"AdapterPool.unpin: {name!r} is not pinned; the pinned adapters are {pinned}")
            self._table.pin(names, -1)
            self._table.release(names)

    @checked
    def evict(self, *names: str) -> None:
        """Frees the slots and cached copies of adapters, so that the next use reads their files again.

        RuntimeError: one is pinned or used by a running call; nothing is changed.
        """
        with self._table.changed:  # no call finds the cached copy of an adapter that has no slot any more
            self._table.evict(names, "AdapterPool.evict")
            self._host.forget(names)

    @checked
    def prefetch(self, names: str | Iterable[str]) -> list[Future]:
        """Loads adapters in the background, for calls to come. Ones that find no idle slot are left out.

        Returns:
            For each name a future: its result is whether the adapter is resident, its exception why it could not be
            loaded. They may be ignored: a call that needs the adapter tries again.
        """
        names = [names] if isinstance(names, str) else list(names)
        self.check_known(names, "AdapterPool.prefetch")
        with self._lock:
            if self._prefetcher is None or self._prefetcher_process != os.getpid():  # a fork has no threads
                self._prefetcher_process = os.getpid()
                self._prefetcher = ThreadPoolExecutor(2, thread_name_prefix="lora_ext-pool")
            return [self._prefetcher.submit(self._prefetch, name) for name in names]

    def _prefetch(self, name: str) -> bool:
        try:
            self._table.acquire((name,), None)
        except RuntimeError:
            return False
        self._table.release((name,))
        return True

    def stats(self) -> PoolStats:
        """Returns the adapters that the pool holds, and counts of its work."""
        table = self._table
        with table.changed, self._lock:
            entries = table.entries.values()
            return PoolStats(
                slots=table.slots,
                slot_bytes=self._slot_bytes,
                resident=sum(entry.ready.is_set() for entry in entries),
                pinned=sum(entry.pins > 0 for entry in entries),
                in_use=sum(entry.users > entry.pins for entry in entries),
                host=len(self._host.adapters),
                host_bytes=self._host.nbytes,
                hits=table.hits,
                misses=table.misses,
                loads=self._loads,
                load_seconds=self._load_seconds,
                evictions=table.evictions,
                failures=table.failures,
                waits=table.waits,
            )

    # --- loading -----------------------------------------------------------------------------------------------------

    def _load(self, name: str, slot: int) -> None:
        begin = time.perf_counter()
        adapter = self._host.get(name)
        if adapter is None:
            path = self._names.path_of(name)
            if path is None:
                raise KeyError(f"AdapterPool: there is no adapter {name!r} any more")
            adapter = read_adapter(path, self._shape)
            self._host.keep(name, adapter)
        with torch.inference_mode(False):
            for layer, held in self._slots.items():
                update = adapter.updates.get(layer)
                if update is None:
                    held.clear(slot)
                else:
                    held.write(slot, update.lora_A, update.lora_B, update.scaling)
            for path, modules in self._modules.items():
                if path in adapter.modules:
                    modules.write(slot, adapter.modules[path])
                else:
                    modules.clear(slot)
        with self._lock:
            self._invocations.pop(name, None)
            if adapter.invocation is not None:
                self._invocations[name] = adapter.invocation
            self._loads += 1
            self._load_seconds += time.perf_counter() - begin

    # --- the end -----------------------------------------------------------------------------------------------------

    @one_at_a_time
    def close(self) -> None:
        """Takes the pool out of its model and frees the storage. Layers without other adapters become plain again.

        Calls of copies of the model that name adapters of the pool are refused from then on.

        RuntimeError: running calls use it.
        """
        with self._lock:
            prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is not None:
            prefetcher.shutdown(wait=True, cancel_futures=True)
        with self._table.changed:
            if any(entry.users > entry.pins for entry in self._table.entries.values()):
                raise RuntimeError("AdapterPool.close: running calls use the pool; wait for their end")
            self._table.close()
            model = self._model()
            if model is not None:
                detach_pool(model, self)
            self._slots, self._modules = {}, {}

    @property
    def is_closed(self) -> bool:
        return self._table.is_closed

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterPool:
        return self  # a copied model uses the same storage

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterPool cannot be pickled; call close() first")

    def __repr__(self) -> str:
        stats = self.stats()
        gib = stats.slots * stats.slot_bytes / 2**30
        return f"AdapterPool({stats.resident} of {stats.slots} slots, r={self._shape.r}, {gib:.2f} GiB)"
