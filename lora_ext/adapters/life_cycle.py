"""Switches, disables, renames, deletes and lists the adapters of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import listed
from lora_ext.injection.inject import remove_empty_layers
from lora_ext.model.adapter_set import Adapter, AdapterSet, adapter_set, check_new_name, check_unmerged, find_adapters
from lora_ext.model.bare_model import adapter_layers, check_not_parallel
from lora_ext.nn import ActiveAdapters, DoraLinear, LoraConv, LoraEmbedding, LoraLayer, LoraLinear
from lora_ext.nn.trained import TrainedModule
from lora_ext.quantized import quantized_weight

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
@one_at_a_time
def set_adapter(model: ModelT, names: str | Iterable[str], trainable: bool | None = None) -> ModelT:
    """Activates exactly these adapters of an injected model.

    Several adapters add up. Deactivated adapters are frozen; named ones become trainable or frozen as when they were
    added (``config.inference_mode``), also those that stay active but were frozen as a whole meanwhile. Merged adapters
    have effect until unmerged, active or not.

    Args:
        names: one or several adapter names; an empty list activates none (the base model).
        trainable: True or False makes the adapters trainable or frozen from now on.

    Raises:
        ValueError: the model is not injected or wrapped by ``DistributedDataParallel``; a name is given twice; or two
            adapters train the same module in full (``modules_to_save``), or are DoRA adapters of one layer.
        KeyError: there is no adapter of that name. RuntimeError: within :func:`disable_adapters`. Nothing is changed.
    """
    check_not_parallel("set_adapter", model)
    adapters = find_adapters(model, "set_adapter")
    adapters.check_enabled("set_adapter")
    names = (names,) if isinstance(names, str) else tuple(names)
    adapters.check_names("set_adapter", names)
    if len(set(names)) < len(names):
        raise ValueError(f"set_adapter: names are {list(names)}, want each once")
    for path, layer in adapter_layers(model) if len(names) > 1 else ():
        together = [name for name in names if name in layer.adapters]
        if len(together) > 1 and isinstance(layer, DoraLinear | TrainedModule):
            what = "has the DoRA adapters" if isinstance(layer, DoraLinear) else "is trained in full by"
            raise ValueError(
                f"set_adapter: {path!r} {what} {together}; use only one of them. To train both in one batch "
                "(adapter_names), activate one and call requires_grad_() on the other's parameters"
            )
    adapters.switch(names, trainable)
    return model


@checked
def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order of addition; empty if it is not injected."""
    return [] if (adapters := adapter_set(model)) is None else list(adapters.configs)


@checked
@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Makes the model compute like its base model within the context, with the base model's heads and biases.

    The end of the outermost context restores the active adapters, so adapters cannot be added, switched, renamed or
    removed meanwhile. Forwards in other threads use the base model too.

    ValueError: the model is not injected. RuntimeError: an adapter is merged, so the base weights contain it.
    """
    adapters = find_adapters(model, "disable_adapters")
    check_unmerged("disable_adapters", model)
    held = {adapters.active, *(layer.active for _, layer in adapter_layers(model))}  # layers may be made by hand
    _change(adapters, held, ActiveAdapters.disable)
    try:
        yield
    finally:
        _change(adapters, held, ActiveAdapters.enable)


@one_at_a_time
def _change(adapters: AdapterSet, held: set[ActiveAdapters], change: Callable[[ActiveAdapters], None]) -> None:
    """Disables or enables adapters; the model gets its own biases, or those of the active adapter."""
    for active in held:
        change(active)
    for name, biases in adapters.biases.items():
        biases.use(name in adapters.active.names)


@checked
@one_at_a_time
def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Removes an inactive adapter. A layer without adapters becomes the plain base layer again.

    Raises:
        ValueError: the model is not injected. KeyError: there is no such adapter.
        RuntimeError: it is active or merged, a call has ``adapter_names``, or adapters are disabled. Nothing changes.
    """
    adapters = find_adapters(model, "delete_adapter")
    adapters.check_enabled("delete_adapter")
    adapters.check_names("delete_adapter", [name])
    if name in adapters.active.names:
        others = sorted(adapters.configs.keys() - {name})
        remedy = f"set_adapter with one of {others}, or unload" if others else "unload(model), as it is the last one"
        raise RuntimeError(f"delete_adapter: {name!r} is active; call {remedy}")
    check_unmerged("delete_adapter", model, name)
    adapters.active.check_unused("delete_adapter")
    adapters.remove(name)
    for _, layer in adapter_layers(model):
        if name in layer.adapters:
            del layer.adapters[name]
    remove_empty_layers(model, adapters)
    return model


@checked
@one_at_a_time
def rename_adapter(model: ModelT, old: str, new: str) -> ModelT:
    """Renames an adapter. Files do not contain the name and stay valid.

    Raises:
        ValueError: the model is not injected, or ``new`` is taken or no name. KeyError: there is no adapter ``old``.
        RuntimeError: it is merged, a running call has ``adapter_names``, or adapters are disabled. Nothing is changed.
    """
    adapters = find_adapters(model, "rename_adapter")
    adapters.check_enabled("rename_adapter")
    adapters.check_names("rename_adapter", [old])
    if new == old:
        return model
    check_new_name("rename_adapter", new, adapters)
    check_unmerged("rename_adapter", model, old)
    adapters.active.check_unused("rename_adapter")
    for _, layer in adapter_layers(model):
        held = {new if name == old else name: adapter for name, adapter in layer.adapters.items()}
        layer.adapters.clear()
        layer.adapters.update(held)
    adapters.rename(old, new)
    return model


class AdapterStatus(NamedTuple):
    """The state of one adapter in one layer."""

    layer: str  # its path
    kind: str  # its class
    adapter: str
    r: int | None  # of a low-rank update; None for a module, or rows, trained in full
    scaling: float | None  # the same
    active: bool
    merged: bool
    trainable: bool  # whether some parameter requires a gradient


@checked
def adapter_status(model: nn.Module) -> list[AdapterStatus]:
    """Returns one entry per layer and adapter of ``model``; empty if it has no adapter layer."""
    status = []
    for path, layer in adapter_layers(model):
        for name, adapter in layer.adapters.items():
            is_low_rank = isinstance(layer, LoraLayer)
            size = (adapter.r, adapter.scaling) if is_low_rank else (None, None)
            is_merged = is_low_rank and name in layer.merged_adapters
            trains = any(parameter.requires_grad for parameter in adapter.parameters())
            kind, is_active = type(layer).__name__, name in layer.active.names
            status.append(AdapterStatus(path, kind, name, *size, is_active, is_merged, trains))
    return status


@checked
def trainable_parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Returns ``(trainable, total)`` numbers of parameter elements; a shared parameter counts once.

    A quantised weight counts as before it was quantised.
    """
    weights = (weight for module in model.modules() if (weight := quantized_weight(module)) is not None)
    packed = {id(weight.module.weight): math.prod(weight.shape) for weight in weights}
    sizes = [(packed.get(id(p), p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def check_low_rank(caller: str, adapter: Adapter) -> None:
    """Raises a ValueError if an adapter has more than low-rank updates of linear, convolutional and embedding layers.

    Grouped convolutions have a rank for each group, which cannot be padded or added up.
    """
    others = {
        part.path: type(part.layer).__name__
        for part in adapter.parts
        if type(part.layer) not in (LoraLinear, LoraConv, LoraEmbedding) or not part.adapter.has_plain_rank
    }
    if adapter.biases is not None:
        others["bias"] = "the model's own biases"
    if others:
        raise ValueError(
            f"{caller}: {adapter.name!r} has more than low-rank updates of linear layers, convolutions without groups "
            f"and embeddings; use load_adapter and set_adapter:{listed([f'{path}: {others[path]}' for path in others])}"
        )
