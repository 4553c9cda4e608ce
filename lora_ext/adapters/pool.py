"""Thousands of adapters on disk and many in memory, for batches whose rows name them."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.printable import first_of, listed
from lora_ext.adapters.pool_files import PoolShape, read_adapter
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import CONFIG_FILE, holds_adapter
from lora_ext.injection.inject import Injection, attach_layers, remove_empty_layers, serve_adapters
from lora_ext.model.adapter_set import Adapter, adapter_set
from lora_ext.model.bare_model import BareModel, adapter_layers, root_module
from lora_ext.nn import LoraLinear
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.base_layer import execution_device
from lora_ext.nn.rows import BASE, LayerSlots


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """The adapters that a pool holds, and counts of its work.

    Attributes:
        slots: how many adapters it can hold.
        slot_bytes: bytes of one slot; ``slots * slot_bytes`` is the storage.
        resident: adapters that have a slot.
        in_use: those of them that running calls use.
        hits: adapters that calls found in a slot.
        loads, load_seconds: adapters that were read from disk.
        evictions: adapters that gave their slot to another one.
    """

    slots: int
    slot_bytes: int
    resident: int
    in_use: int
    hits: int
    loads: int
    load_seconds: float
    evictions: int


class AdapterPool:
    """Adapters in slots of shared storage, read from PEFT directories when rows name them.

    ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` then take names of the pool.
    An adapter is read when a call needs it, and has a slot at least until the call ends; the least recently used one
    that no call uses is evicted for another. Reading moves nothing that a running call uses. All methods may be called
    by several threads at the same time; one reads at a time.

    A pool holds low-rank updates of linear layers (also quantised ones), for inference. Adapters of the model itself
    (:func:`lora_ext.inject`, :func:`lora_ext.load_adapter`) stay, and come first where a name is both.

    Args:
        model: the model, bare or injected; on the device that computes. It is frozen as by :func:`lora_ext.inject`.
        directory: adapters are its subdirectories, by name; None: only those of :meth:`add`.
        target_modules: the layers that an adapter of the pool can adapt, as in :class:`~lora_ext.LoraConfig`.
        r: the largest rank of an adapter. Each slot has this rank.
        max_bytes: of the storage on the model's device. The memory is reserved at once; an operating system gives pages
            of host memory as slots are filled.
        dtype: of the factors; None: that of the layers, or float32 if that has 16 bits.
        timeout: seconds that a call waits for slots which other calls use.

    Raises:
        ValueError, TypeError: as :func:`lora_ext.inject`; or the model has a pool already, ``max_bytes`` is less than a
            slot, targets are no linear layers, ``directory`` is none, or ``timeout`` is negative. The model is then
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
        r: int,
        max_bytes: int,
        dtype: torch.dtype | None = None,
        timeout: float = 60.0,
    ) -> None:
        if not timeout >= 0:
            raise ValueError(f"AdapterPool: timeout is {timeout}, want 0 or more")
        self._directory = None if directory is None else Path(directory).absolute()  # the current one may change
        if self._directory is not None and not self._directory.is_dir():
            raise ValueError(
                f"AdapterPool: directory is {os.fspath(directory)!r}, which is not a directory; want the one that "
                "holds the adapters' directories"
            )
        adapter = _layers_of(model, LoraConfig(r=r, target_modules=target_modules))
        shapes = {part.path: (part.layer.in_features, part.layer.out_features) for part in adapter.parts}
        dtypes = {part.path: dtype or part.adapter.lora_A.dtype for part in adapter.parts}
        slot_bytes = sum(r * sum(sizes) * dtypes[path].itemsize + 16 for path, sizes in shapes.items())
        self._num_slots, self._slot_bytes = max_bytes // slot_bytes, slot_bytes
        if self._num_slots < 1:
            raise ValueError(
                f"AdapterPool: max_bytes is {max_bytes}, but one slot of rank {r} takes {slot_bytes}; raise max_bytes, "
                "or choose a smaller r or fewer target_modules"
            )
        bare = BareModel(root_module(model))
        head = next((path for path, module in bare.modules.items() if module is bare.head), None)
        self._shape, self._timeout = PoolShape(shapes, r, head), timeout
        self._changed = threading.Condition()  # its lock guards what follows
        self._added: dict[str, Path] = {}
        self._held: OrderedDict[str, int] = OrderedDict()  # slots by name, the least recently used first
        self._free = list(range(self._num_slots))[::-1]
        self._users: Counter[str] = Counter()  # running calls, by name
        self._hits = self._loads = self._evictions = 0
        self._load_seconds = 0.0
        self._layers = _attach(model, adapter, self, self._num_slots, r, dtypes)
        self._model = weakref.ref(root_module(model))

    # --- names --------------------------------------------------------------------------------------------------------

    @checked
    def add(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Makes the adapter in ``directory`` known as ``name``. It is read when a call needs it.

        Raises:
            ValueError: the name is taken, also by a subdirectory; it is empty or ``"__base__"``.
            FileNotFoundError: there is no adapter in ``directory``.
            RuntimeError: a running call uses an adapter of this name whose directory is gone.
        """
        directory = Path(directory).absolute()
        if name in ("", BASE):
            raise ValueError(f"AdapterPool.add: name is {name!r}, want another one")
        if not holds_adapter(directory):
            raise FileNotFoundError(f"AdapterPool.add: {directory / CONFIG_FILE} is missing; want a directory of PEFT")
        with self._changed:
            if (path := self._path_of(name)) is not None:
                raise ValueError(f"AdapterPool.add: {name!r} is known already, as {path}; choose another name")
            self.evict(name)  # an adapter that had this name before
            self._added[name] = directory

    @checked
    def remove(self, name: str) -> None:
        """Forgets a name of :meth:`add` and frees its slot. RuntimeError: it is in use. KeyError: it is not known."""
        with self._changed:
            if name not in self._added:
                names = first_of(map(repr, sorted(self._added)), _SHOWN)
                raise KeyError(f"AdapterPool.remove: {name!r} was not added; the names are [{names}]")
            self.evict(name)
            del self._added[name]

    def names(self) -> list[str]:
        """The known names: those of :meth:`add` and the subdirectories that hold an adapter; reads the directory."""
        with self._changed:
            names = set(self._added)
        if self._directory is not None and self._directory.is_dir():  # it may be gone by now
            names |= {entry.name for entry in os.scandir(self._directory) if holds_adapter(Path(entry.path))}
        return sorted(names)

    def resident(self) -> list[str]:
        """The names that have a slot, the least recently used first."""
        with self._changed:
            return list(self._held)

    def knows(self, name: str) -> bool:
        """Returns whether the pool holds the adapter, or can find it."""
        with self._changed:
            return name in self._held or self._path_of(name) is not None

    def check_known(self, names: Iterable[str], caller: str, adapters_of_model: Iterable[str] = ()) -> None:
        """Checks that the pool holds the adapters, or can find them. KeyError: names the known ones.

        Args:
            adapters_of_model: adapters of the model itself, for the message.
        """
        for name in names:
            if not self.knows(name):
                shown = first_of(map(repr, [*adapters_of_model, *self.names()]), _SHOWN)
                raise KeyError(f"{caller}: there is no adapter {name!r}; the adapters are [{shown}]")

    def _path_of(self, name: str) -> Path | None:
        """Returns the adapter's directory, or None. A name that is no single component could lead elsewhere."""
        if name in self._added:
            return self._added[name]
        separators = {os.sep, os.altsep, "\0"} - {None}
        if self._directory is None or name in ("", ".", "..", BASE) or any(s in name for s in separators):
            return None
        path = self._directory / name
        return path if holds_adapter(path) else None

    # --- slots --------------------------------------------------------------------------------------------------------

    def acquire(self, names: Sequence[str]) -> dict[str, int]:
        """Gives every name a slot that it keeps until :meth:`release`: all or none. For the model's calls.

        Raises:
            RuntimeError: there are more names than slots, running calls leave too few, or the pool is closed.
            KeyError, OSError, ValueError: an adapter is gone, cannot be read, or does not fit.
        """
        with self._changed:
            has_slots = self._changed.wait_for(lambda: len(names) > self._num_slots or self._fit(names), self._timeout)
            if self.is_closed:
                raise RuntimeError("AdapterPool: the pool is closed, and holds no adapters; make another one")
            if len(names) > self._num_slots:
                raise RuntimeError(
                    f"AdapterPool: {len(names)} adapters are wanted at once, but the pool has {self._num_slots} slots; "
                    "raise max_bytes, or split the batch"
                )
            if not has_slots:
                raise RuntimeError(
                    f"AdapterPool: running calls use the slots that {first_of(map(repr, names), _SHOWN)} need; raise "
                    "max_bytes or timeout, or run fewer calls at the same time"
                )
            self._users.update(names)
            try:
                for name in names:
                    self._bring(name)
            except BaseException:
                self.release(names)
                raise
            return {name: self._held[name] for name in names}

    def _fit(self, names: Sequence[str]) -> bool:
        """Returns whether slots for all names are free, theirs already, or those of adapters that no call uses."""
        in_use = {name for name in self._held if self._users[name] and name not in names}
        return len(names) + len(in_use) <= self._num_slots

    def _bring(self, name: str) -> None:
        """Reads an adapter into a slot, if it has none."""
        if name in self._held:
            self._hits += 1
            self._held.move_to_end(name)
            return
        begin, path = time.perf_counter(), self._path_of(name)
        if path is None:
            raise KeyError(f"AdapterPool: there is no adapter {name!r} any more")
        updates = read_adapter(path, self._shape)
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._held.pop(next(name for name in self._held if not self._users[name]))
            self._evictions += 1
        try:
            for layer_path, held in self._layers.items():
                if (update := updates.get(layer_path)) is None:
                    held.clear(slot)
                else:
                    held.write(slot, update.lora_A, update.lora_B, update.scaling)
        except BaseException:  # Ctrl-C
            self._free.append(slot)
            raise
        self._held[name] = slot
        self._loads += 1
        self._load_seconds += time.perf_counter() - begin

    def release(self, names: Sequence[str]) -> None:
        """Undoes :meth:`acquire`."""
        with self._changed:
            self._users.subtract(names)
            self._users = +self._users
            self._changed.notify_all()

    @checked
    def evict(self, *names: str) -> None:
        """Frees the slots of adapters, so that the next use reads their files again.

        RuntimeError: one is used by a running call; nothing is changed.
        """
        with self._changed:
            for name in names:
                if self._users[name]:
                    raise RuntimeError(f"AdapterPool.evict: {name!r} is used by a running call")
            self._free += [self._held.pop(name) for name in dict.fromkeys(names) if name in self._held]
            self._changed.notify_all()

    def stats(self) -> PoolStats:
        """Returns the adapters that the pool holds, and counts of its work."""
        with self._changed:
            return PoolStats(
                slots=self._num_slots,
                slot_bytes=self._slot_bytes,
                resident=len(self._held),
                in_use=len(self._users),
                hits=self._hits,
                loads=self._loads,
                load_seconds=self._load_seconds,
                evictions=self._evictions,
            )

    # --- the end ------------------------------------------------------------------------------------------------------

    @one_at_a_time
    def close(self) -> None:
        """Takes the pool out of its model and frees the storage. Layers without other adapters become plain again.

        Calls of copies of the model that name adapters of the pool are refused from then on.

        RuntimeError: running calls use it.
        """
        with self._changed:
            if self._users:
                raise RuntimeError("AdapterPool.close: running calls use the pool; wait for their end")
            self._num_slots, self._layers = 0, {}
            self._held.clear()
            self._free.clear()
            self._changed.notify_all()
        if (model := self._model()) is not None:
            _detach(model, self)

    @property
    def is_closed(self) -> bool:
        return self._num_slots == 0

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterPool:
        return self  # a copied model uses the same storage

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterPool cannot be pickled; call close() first")

    def __repr__(self) -> str:
        gib = self._num_slots * self._slot_bytes / 2**30
        return f"AdapterPool({len(self._held)} of {self._num_slots} slots, r={self._shape.r}, {gib:.2f} GiB)"


_SHOWN = 8  # names in a message


# --- the layers of a model --------------------------------------------------------------------------------------------


def _layers_of(model: nn.Module, config: LoraConfig) -> Adapter:
    """Finds the layers that ``config`` names, and makes those that the model lacks; the model is unchanged.

    Returns:
        An adapter without memory, which is never attached, for its layers.
    """
    adapters = adapter_set(model)
    if adapters is not None and adapters.pool is not None:
        if not adapters.pool.is_closed:
            raise ValueError("AdapterPool: the model has a pool already; close that first")
        _detach(model, adapters.pool)  # closed by the model that this one is a copy of
        adapters = adapter_set(model)
    taken = () if adapters is None else adapters.configs
    name = next(name for i in range(len(taken) + 1) if (name := f"pool{i}") not in taken)
    adapter, _ = Injection(model, config, name).build_without_memory()
    others = [
        f"{part.path} ({type(part.layer).__name__})" for part in adapter.parts if not isinstance(part.layer, LoraLinear)
    ]
    if others:
        raise TypeError(
            "AdapterPool: a pool holds adapters of linear layers; narrow target_modules, as these targets are others:"
            f"{listed(others)}"
        )
    return adapter


def _attach(
    model: nn.Module, adapter: Adapter, pool: AdapterPool, slots: int, r: int, dtypes: dict[str, torch.dtype]
) -> dict[str, LayerSlots]:
    """Puts the layers of ``adapter`` into the model, with storage for the adapters of ``pool``: returns it, by path."""
    held = {}
    for part in adapter.parts:
        layer = part.layer
        device = execution_device(innermost(layer)) or layer.weight.device  # a weight may be offloaded
        held[part.path] = LayerSlots(slots, r, layer.in_features, layer.out_features, dtypes[part.path], device)
    attach_layers(model, adapter)
    for part in adapter.parts:
        part.layer.slots = held[part.path]
    adapter.into.pool = pool
    adapter.into.active.changes += 1
    serve_adapters(model, adapter.into)
    return held


@one_at_a_time
def _detach(model: nn.Module, pool: AdapterPool) -> None:
    """Undoes :func:`_attach`: layers without adapters are replaced by their base layers."""
    adapters = adapter_set(model)
    if adapters is None or adapters.pool is not pool:  # unloaded meanwhile
        return
    adapters.pool = None
    adapters.active.changes += 1
    for _, layer in adapter_layers(model):
        if isinstance(layer, LoraLinear):
            layer.slots = None
    remove_empty_layers(model, adapters)
