"""Thousands of adapters on disk and many in memory, for batches whose rows name them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.matching import LayerNumbers, PathMatcher
from lora_ext._common.messages import first_of, listed
from lora_ext._common.modules import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile, holds_adapter, misfits
from lora_ext.injection.all_linear import is_all_linear
from lora_ext.injection.build import Injection
from lora_ext.injection.inject import attach_layers, remove_empty_layers, serve_adapters
from lora_ext.model.adapter_set import Adapter, adapter_set
from lora_ext.model.bare_model import BareModel, adapter_layers, root_module
from lora_ext.nn import LoraLinear
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.base_layer import execution_device
from lora_ext.nn.rows import BASE, LayerSlots

_SHOWN = 8  # names in a message
_OTHER_PARTS = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "use_dora")


class PoolStats(NamedTuple):
    """The adapters that a pool holds, and counts of its work."""

    slots: int  # how many adapters it can hold
    slot_bytes: int  # slots * slot_bytes is the storage
    resident: int  # adapters that have a slot
    in_use: int  # those of them that running calls use
    hits: int  # adapters that calls found in a slot
    loads: int  # adapters that were read from disk
    evictions: int  # adapters that gave their slot to another one


class AdapterPool:
    """Adapters in slots of shared storage, read from PEFT directories when rows name them.

    ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` then take names of the pool.
    An adapter is read when a call needs it, and has a slot at least until the call ends; the least recently used one
    that no call uses is evicted for another. Reading moves nothing that a running call uses. All methods may be called
    by several threads at the same time; one reads at a time.

    A pool holds low-rank updates of linear layers (also quantised ones), for inference. Adapters of the model itself
    stay, and come first where a name is both.

    Args:
        model: the model, bare or injected; on the device that computes. It is frozen as by :func:`lora_ext.inject`.
        directory: adapters are its subdirectories, or links to directories, by name.
        target_modules: the layers that an adapter of the pool can adapt, as in :class:`~lora_ext.LoraConfig`.
        r: the largest rank of an adapter. Each slot has this rank.
        max_bytes: of the storage on the model's device. The memory is reserved at once; an operating system gives pages
            of host memory as slots are filled.
        dtype: of the factors; None: that of the layers, or float32 if that has 16 bits.

    Raises:
        ValueError, TypeError: as :func:`lora_ext.inject`; or the model has a pool already, ``max_bytes`` is less than a
            slot, targets are no linear layers, or ``directory`` is none. The model is then unchanged.
    """

    @checked
    @one_at_a_time
    def __init__(
        self,
        model: nn.Module,
        directory: str | os.PathLike[str],
        *,
        target_modules: str | Iterable[str],
        r: int,
        max_bytes: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._directory = Path(directory).absolute()  # the current one may change
        if not self._directory.is_dir():
            raise ValueError(
                f"AdapterPool: directory is {os.fspath(directory)!r}, which is not a directory; want the one that "
                "holds the adapters' directories"
            )
        adapter = _layers_of(model, LoraConfig(r=r, target_modules=target_modules))
        self._r = r
        self._sizes = {part.path: (part.layer.in_features, part.layer.out_features) for part in adapter.parts}
        dtypes = {part.path: dtype or part.adapter.lora_A.dtype for part in adapter.parts}
        slot_bytes = sum(r * sum(sizes) * dtypes[path].itemsize + 16 for path, sizes in self._sizes.items())
        self._num_slots, self._slot_bytes = max_bytes // slot_bytes, slot_bytes
        if self._num_slots < 1:
            raise ValueError(
                f"AdapterPool: max_bytes is {max_bytes}, but one slot of rank {r} takes {slot_bytes}; raise max_bytes, "
                "or choose a smaller r or fewer target_modules"
            )
        bare = BareModel(root_module(model))
        self._head = next((path for path, module in bare.modules.items() if module is bare.head), None)
        self._lock = threading.RLock()  # guards what follows
        self._held: OrderedDict[str, int] = OrderedDict()  # slots by name, the least recently used first
        self._free = list(range(self._num_slots))[::-1]
        self._users: Counter[str] = Counter()  # running calls, by name
        self._hits = self._loads = self._evictions = 0
        self._layers = {
            part.path: LayerSlots(self._num_slots, r, *self._sizes[part.path], dtypes[part.path], _device(part.layer))
            for part in adapter.parts
        }
        attach_layers(model, adapter)
        for part in adapter.parts:
            part.layer.slots = self._layers[part.path]
        adapter.into.pool = self
        serve_adapters(model, adapter.into)
        self._model = weakref.ref(root_module(model))

    # --- names --------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of the subdirectories that hold an adapter; reads the directory."""
        entries = os.scandir(self._directory) if self._directory.is_dir() else ()  # it may be gone by now
        return sorted(entry.name for entry in entries if holds_adapter(Path(entry.path)))

    def resident(self) -> list[str]:
        """The names that have a slot, the least recently used first."""
        with self._lock:
            return list(self._held)

    def check_known(self, names: Iterable[str], caller: str, adapters_of_model: Iterable[str]) -> None:
        """Raises a KeyError if the pool neither holds an adapter nor can find it."""
        held = {*self.resident()}
        for name in names:
            if name not in held and self._path_of(name) is None:
                known = first_of(map(repr, [*adapters_of_model, *self.names()]), _SHOWN)
                raise KeyError(f"{caller}: there is no adapter {name!r}; the adapters are [{known}]")

    def _path_of(self, name: str) -> Path | None:
        """Returns the adapter's directory, or None. A name that is no single component could lead elsewhere."""
        separators = {os.sep, os.altsep, "\0"} - {None}
        if name in ("", ".", "..", BASE) or any(separator in name for separator in separators):
            return None
        path = self._directory / name
        return path if holds_adapter(path) else None

    # --- slots --------------------------------------------------------------------------------------------------------

    def acquire(self, names: Sequence[str]) -> dict[str, int]:
        """Gives every name a slot that it keeps until :meth:`release`: all or none. For the model's calls.

        Raises:
            RuntimeError: there are more names than slots, or running calls leave too few.
            KeyError, OSError, ValueError: an adapter is gone, cannot be read, or does not fit.
        """
        with self._lock:
            in_use = {name for name in self._held if self._users[name] and name not in names}
            if len(names) + len(in_use) > self._num_slots:
                wanted = first_of(map(repr, names), _SHOWN)
                raise RuntimeError(
                    f"AdapterPool: {len(names)} adapters are wanted at once ({wanted}), and running calls use "
                    f"{len(self._users)} of {self._num_slots} slots; raise max_bytes, split the batch, or run fewer "
                    "calls at the same time"
                )
            self._users.update(names)
            try:
                for name in names:
                    if name in self._held:
                        self._hits += 1
                        self._held.move_to_end(name)
                    else:
                        self._load(name)
            except BaseException:
                self.release(names)
                raise
            return {name: self._held[name] for name in names}

    def _load(self, name: str) -> None:
        """Reads an adapter into a free slot, or into that of the least recently used one that no call uses."""
        if (path := self._path_of(name)) is None:
            raise KeyError(f"AdapterPool: there is no adapter {name!r} any more")
        updates = self._read(path)
        if not self._free:
            self._free.append(self._held.pop(next(held for held in self._held if not self._users[held])))
            self._evictions += 1
        slot = self._free[-1]
        for layer_path, storage in self._layers.items():
            if layer_path in updates:
                storage.write(slot, *updates[layer_path])
            else:
                storage.clear(slot)
        self._held[name] = self._free.pop()
        self._loads += 1

    def _read(self, directory: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Returns the adapter in ``directory`` by the paths of its layers: ``lora_A``, ``lora_B`` and the scaling.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is corrupted, its config is not supported, or the adapter does not fit the pool: other
                layers, shapes, a larger rank, or parts that are no low-rank updates. The message lists what.
        """
        file = AdapterFile.open(directory, caller="AdapterPool")
        config = file.lora_config("AdapterPool")
        parts = [name for name in _OTHER_PARTS if getattr(config, name)] + ["bias"] * (config.bias != "none")
        problems = [f"{name}: a pool holds low-rank updates of linear layers" for name in parts]
        keys, targets = {}, {}
        for path in self._named(config):  # a whole file has factors of these layers and no others
            in_features, out_features = self._sizes[path]
            if (rank := config.rank_for(path)) > self._r:
                problems.append(f"rank of {path}: {rank}, above the pool's {self._r}")
            keys[path] = A, B = f"{KEY_PREFIX}{path}.lora_A.weight", f"{KEY_PREFIX}{path}.lora_B.weight"
            targets[A] = torch.empty(rank, in_features, device="meta")
            targets[B] = torch.empty(out_features, rank, device="meta")
        problems += misfits(targets, file.tensors)
        if problems or not targets:
            base = file.config.get("base_model_name_or_path")
            raise ValueError(
                f"AdapterPool: {file.path} does not fit the pool of rank {self._r} (its base model is {base!r}); load "
                "it with load_adapter, or make a pool with its layers and rank:"
                f"{listed(problems or ['it has no factors'])}"
            )
        return {path: (file.tensors[A], file.tensors[B], config.scaling_for(path)) for path, (A, B) in keys.items()}

    def _named(self, config: LoraConfig) -> list[str]:
        """Returns those of the pool's layers that ``config`` targets."""
        is_every, matches = is_all_linear(config), PathMatcher("target_modules", config.target_modules)
        is_excluded = PathMatcher("exclude_modules", config.exclude_modules)
        numbers = LayerNumbers(config)
        targets = (path for path in self._sizes if (path != self._head if is_every else matches(path)))
        return [path for path in targets if path in numbers and not is_excluded(path)]

    def release(self, names: Sequence[str]) -> None:
        """Undoes :meth:`acquire`."""
        with self._lock:
            self._users.subtract(names)
            self._users = +self._users

    @checked
    def evict(self, *names: str) -> None:
        """Frees the slots of adapters, so that the next use reads their files again.

        RuntimeError: one is used by a running call; nothing is changed.
        """
        with self._lock:
            for name in names:
                if self._users[name]:
                    raise RuntimeError(f"AdapterPool.evict: {name!r} is used by a running call")
            self._free += [self._held.pop(name) for name in dict.fromkeys(names) if name in self._held]

    def stats(self) -> PoolStats:
        with self._lock:
            counts = len(self._held), len(self._users), self._hits, self._loads, self._evictions
            return PoolStats(self._num_slots, self._slot_bytes, *counts)

    # --- the end ------------------------------------------------------------------------------------------------------

    @one_at_a_time
    def close(self) -> None:
        """Takes the pool out of its model and frees the storage. Layers without other adapters become plain again.

        RuntimeError: running calls use it.
        """
        with self._lock:
            if self._users:
                raise RuntimeError("AdapterPool.close: running calls use the pool; wait for their end")
            self._num_slots, self._layers = 0, {}
            self._held.clear()
            self._free.clear()
        model = self._model()
        if model is None or (adapters := adapter_set(model)) is None or adapters.pool is not self:
            return  # unloaded meanwhile
        adapters.pool = None
        for _, layer in adapter_layers(model):
            if isinstance(layer, LoraLinear):
                layer.slots = None
        remove_empty_layers(model, adapters)

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterPool, or a model that has one, cannot be copied or pickled; call close() first")


def _layers_of(model: nn.Module, config: LoraConfig) -> Adapter:
    """Finds the layers that ``config`` names, and makes those that the model lacks; the model is unchanged.

    Returns:
        An adapter without memory, which is never attached, for its layers.
    """
    if (adapters := adapter_set(model)) is not None and adapters.pool is not None:
        raise ValueError("AdapterPool: the model has a pool already; close that first")
    adapter = Injection(model, config, "AdapterPool").build(torch.device("meta"))
    others = [part for part in adapter.parts if not isinstance(part.layer, LoraLinear)]
    if others:
        raise TypeError(
            "AdapterPool: a pool holds adapters of linear layers; narrow target_modules, as these targets are others:"
            f"{listed([f'{part.path} ({type(part.layer).__name__})' for part in others])}"
        )
    return adapter


def _device(layer: LoraLinear) -> torch.device:
    return execution_device(innermost(layer)) or layer.weight.device  # a weight may be offloaded
