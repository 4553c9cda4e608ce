"""Gives the layers of a model the storage of an adapter pool, and takes it away again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_ext._common.changes import changing, one_at_a_time
from lora_ext._common.printable import listed
from lora_ext.config import LoraConfig
from lora_ext.injection.inject import Injection, attach_layers, remove_empty_layers, serve_adapters
from lora_ext.model.adapter_set import Adapter, adapter_set
from lora_ext.model.bare_model import adapter_layers
from lora_ext.nn import LoraLinear
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.base_layer import execution_device
from lora_ext.nn.rows.layer_slots import LayerSlots
from lora_ext.nn.rows.module_slots import ModuleSlots
from lora_ext.nn.trained import TrainedModule

_PLACEHOLDER = "pool"  # the name of an adapter that is built without memory, for its layers


@dataclasses.dataclass(frozen=True)
class PoolLayers:
    """The layers of a pool, made but not in the model yet."""

    adapter: Adapter

    @property
    def found(self) -> dict[str, LoraLinear]:
        """Layers with low-rank updates, by path in the model without adapters."""
        return {part.path: part.layer for part in self.adapter.parts if isinstance(part.layer, LoraLinear)}

    @property
    def trained(self) -> dict[str, TrainedModule]:
        """Layers around modules that adapters train in full, by path."""
        return {part.path: part.layer for part in self.adapter.parts if isinstance(part.layer, TrainedModule)}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Maps the path of each layer to the dtype of a new low-rank adapter."""
        return {part.path: part.adapter.lora_A.dtype for part in self.adapter.parts if part.path in self.found}


@one_at_a_time
def pool_layers(model: nn.Module, config: LoraConfig) -> PoolLayers:
    """Finds the layers that ``config`` names, and makes those that the model lacks; the model is unchanged.

    Raises:
        ValueError, TypeError: as :func:`lora_ext.inject`; or a target is no linear layer, or the model has a pool.
    """
    adapters = adapter_set(model)
    if adapters is not None and adapters.pool is not None:
        if not adapters.pool.is_closed:
            raise ValueError("AdapterPool: the model has a pool already; close that first")
        detach_pool(model, adapters.pool)  # closed by the model that this one is a copy of
        adapters = adapter_set(model)
    taken = () if adapters is None else adapters.configs
    name = next(name for i in range(len(taken) + 1) if (name := f"{_PLACEHOLDER}{i}") not in taken)
    adapter, _ = Injection(model, config, name).build_without_memory()
    others = [
        f"{part.path} ({type(part.layer).__name__})"
        for part in adapter.parts
        if not isinstance(part.layer, LoraLinear | TrainedModule)
    ]
    if others:
        raise TypeError(
            "AdapterPool: a pool holds adapters of linear layers; narrow target_modules, as these targets are others:"
            f"{listed(others)}"
        )
    return PoolLayers(adapter)


@one_at_a_time
def attach_pool(
    model: nn.Module, layers: PoolLayers, pool: Any, slots: int, r: int, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, LayerSlots], dict[str, ModuleSlots]]:
    """Puts the layers into the model, with storage for the adapters of ``pool``.

    Returns:
        The storage of low-rank updates and that of modules trained in full, by path.
    """
    held = {}
    for path, layer in layers.found.items():
        sizes = layer.in_features, layer.out_features
        device = execution_device(innermost(layer)) or layer.weight.device  # a weight may be offloaded
        held[path] = LayerSlots(slots, r, *sizes, dtypes[path], device)
    modules = {path: ModuleSlots(layer.base_layer, slots) for path, layer in layers.trained.items()}
    into = layers.adapter.into
    with changing(into.active):
        attach_layers(model, layers.adapter)
        for path, layer in layers.found.items():
            layer.slots = held[path]
        for path, layer in layers.trained.items():
            layer.slots = modules[path]
        into.pool = pool
        serve_adapters(model, into)
    return held, modules


@one_at_a_time
def detach_pool(model: nn.Module, pool: Any) -> None:
    """Undoes :func:`attach_pool`: layers without adapters are replaced by their base layers."""
    adapters = adapter_set(model)
    if adapters is None or adapters.pool is not pool:  # unloaded meanwhile
        return
    with changing(adapters.active):
        adapters.pool = None
        for _, layer in adapter_layers(model):
            if isinstance(layer, LoraLinear | TrainedModule):
                layer.slots = None
        remove_empty_layers(model, adapters)
