"""Switches, disables, renames, deletes and lists the adapters of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import changing, one_at_a_time
from lora_ext.adapters.adapter_set import adapter_set, check_names, find_adapters
from lora_ext.injection.bare_model import adapter_layers, root_module
from lora_ext.injection.inject import check_new_name, forget_injection, lora_modules, replace_modules
from lora_ext.merging.model import some
from lora_ext.nn import ActiveAdapters, LoraLayer

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
@one_at_a_time
def set_adapter(model: ModelT, names: str | Iterable[str], trainable: bool | None = None) -> ModelT:
    """Uses these adapters of an injected model, and no others.

    Several add up. Parameters of adapters that go out of use are frozen; those of adapters that come into use are
    trainable as they were when added (``config.inference_mode``). Layers share one list of the names in use, so that a
    switch costs the same however many adapters the model holds. Merged adapters act until unmerged, whatever is in use.

    Args:
        model: was injected.
        names: one or several adapter names; none: the base model alone.
        trainable: makes the adapters trainable, or frozen, from now on.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: the model is not injected, a name is given twice, or two of the adapters train the same module in
            full (``modules_to_save``).
        KeyError: there is no adapter of that name; the message lists them.
        RuntimeError: within :func:`disable_adapters`. Nothing is changed.
    """
    adapters = find_adapters(model, "set_adapter")
    adapters.check_enabled("set_adapter")
    names = (names,) if isinstance(names, str) else tuple(names)
    check_names("set_adapter", adapters.configs, names)
    if len(set(names)) < len(names):
        raise ValueError(f"set_adapter: names are {list(names)}, want each once")
    for path in {path for name in names for path in adapters.trained[name]}:
        if len(held := [name for name in names if path in adapters.trained[name]]) > 1:
            raise ValueError(
                f"set_adapter: {path!r} is trained in full by {held}, and can be one of them only; use one of these"
            )
    adapters.switch(names, trainable)
    return model


@checked
def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that an injected model holds, in the order they were added; empty if it is not."""
    adapters = adapter_set(model)
    return list(adapters.configs) if adapters is not None else []


@checked
@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what its base model computes, with its own heads and biases.

    It restores what was in use: adapters cannot be added, switched, renamed or removed within it. Forwards of other
    threads compute with the base model too.

    Raises:
        ValueError: there is no LoRA layer.
        RuntimeError: an adapter is merged, so that the base weights are not the base's; or another thread is within
            such a context, whose end would enable the adapters.
    """
    shared = _disable(model)
    try:
        yield
    finally:
        _enable(model, shared)


@one_at_a_time
def _disable(model: nn.Module) -> set[ActiveAdapters]:
    """Returns what was disabled: what the layers share."""
    shared = {layer.active for _, layer in adapter_layers(model)}
    if not shared:
        raise ValueError(
            f"disable_adapters: {type(model).__name__} has no LoRA layer; call inject(model, config) first"
        )
    merged = [path for path, layer in lora_modules(model) if layer.is_merged]
    if merged:
        raise RuntimeError(f"disable_adapters: {some(merged)} merged; call unmerge(model) first")
    if any(active.is_disabled_elsewhere for active in shared):
        raise RuntimeError("disable_adapters: another thread is within disable_adapters(model); wait for its end")
    with changing(*shared):
        for active in shared:
            active.disable()
        _use_biases(model)
    return shared


@one_at_a_time
def _enable(model: nn.Module, shared: set[ActiveAdapters]) -> None:
    with changing(*shared):
        for active in shared:
            active.enable()
        _use_biases(model)


def _use_biases(model: nn.Module) -> None:
    """Gives the model its own biases, or those of the adapter in use."""
    adapters = adapter_set(model)
    for name, biases in adapters.biases.items() if adapters is not None else ():
        biases.use(name in adapters.active.names)


@checked
@one_at_a_time
def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Removes an adapter, which must not be in use. A layer without any left is the plain base layer again, and so is
    the model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: the model is not injected.
        KeyError: there is no such adapter; the message lists them.
        RuntimeError: it is active or merged, or adapters are disabled. Nothing is changed.
    """
    adapters = find_adapters(model, "delete_adapter")
    adapters.check_enabled("delete_adapter")
    check_names("delete_adapter", adapters.configs, [name])
    if name in adapters.active.names:
        others = sorted(adapters.configs.keys() - {name})
        raise RuntimeError(
            f"delete_adapter: {name!r} is active; "
            + (
                f"call set_adapter(model, ...) first: there is {others}"
                if others
                else "it is the last: call unload(model)"
            )
        )
    _check_unmerged("delete_adapter", model, name)
    with changing(adapters.active):
        adapters.remove(name)
        for _, layer in adapter_layers(model):
            if name in layer.adapters:
                del layer.adapters[name]
        empty = {layer: layer.base_layer for _, layer in adapter_layers(model) if not layer.is_needed}
        while empty:  # one may be around another
            replace_modules(root_module(model), empty)
            held = {layer for _, layer in adapter_layers(model)}
            empty = {layer: base for layer, base in empty.items() if layer in held}
        if not adapters.configs:
            forget_injection(model)
    return model


@checked
@one_at_a_time
def rename_adapter(model: ModelT, old: str, new: str) -> ModelT:
    """Gives an adapter another name. Files do not hold names, and need no change.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: the model is not injected, or ``new`` is taken or cannot be a name.
        KeyError: there is no adapter ``old``; the message lists them.
        RuntimeError: it is merged, or adapters are disabled. Nothing is changed.
    """
    adapters = find_adapters(model, "rename_adapter")
    adapters.check_enabled("rename_adapter")
    check_names("rename_adapter", adapters.configs, [old])
    if new == old:
        return model
    check_new_name("rename_adapter", new, adapters)
    _check_unmerged("rename_adapter", model, old)
    with changing(adapters.active):
        for _, layer in adapter_layers(model):
            held = {new if name == old else name: adapter for name, adapter in layer.adapters.items()}
            layer.adapters.clear()
            layer.adapters.update(held)
        adapters.rename(old, new)
    return model


@dataclasses.dataclass(frozen=True)
class AdapterStatus:
    """One adapter of one layer.

    Attributes:
        layer: the layer's path.
        kind: its class.
        adapter: the adapter's name.
        r, scaling: of a low-rank update; None of a module trained in full.
        active, merged: whether it is in use; whether the base weight contains it.
        trainable: whether all its parameters require a gradient; None: some do.
        dtype, device: of its parameters; None where it has none.
        parameters: how many numbers it holds.
    """

    layer: str
    kind: str
    adapter: str
    r: int | None
    scaling: float | None
    active: bool
    merged: bool
    trainable: bool | None
    dtype: torch.dtype | None
    device: torch.device | None
    parameters: int


@checked
def adapter_status(model: nn.Module) -> list[AdapterStatus]:
    """What every layer of ``model`` holds, an entry for each layer and adapter; empty if it holds none."""
    status = []
    for path, layer in adapter_layers(model):
        for name, adapter in layer.adapters.items():
            parameters = list(adapter.parameters())
            flags = {parameter.requires_grad for parameter in parameters if parameter.is_floating_point()}
            first = next((p for p in parameters if p.is_floating_point()), next(iter(parameters), None))
            low_rank = isinstance(layer, LoraLayer)
            status.append(
                AdapterStatus(
                    path,
                    type(layer).__name__,
                    name,
                    adapter.r if low_rank else None,
                    adapter.scaling if low_rank else None,
                    name in layer.active.names,
                    isinstance(layer, LoraLayer) and name in layer.merged_adapters,
                    flags.pop() if len(flags) == 1 else None,
                    None if first is None else first.dtype,
                    None if first is None else first.device,
                    sum(parameter.numel() for parameter in parameters),
                )
            )
    return status


@checked
def trainable_parameter_counts(model: nn.Module) -> tuple[int, int]:
    """``(trainable, total)`` numbers of parameter elements; a shared parameter counts once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def _check_unmerged(caller: str, model: nn.Module, name: str) -> None:
    merged = [path for path, layer in lora_modules(model) if name in layer.merged_adapters]
    if merged:
        raise RuntimeError(f"{caller}: {name!r} is merged in {some(merged)}; call unmerge(model, {name!r}) first")
