"""Acts on all the LoRA layers of a model at once: merge, unmerge, disable, unload, count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from .inject import forget_injection, lora_modules, parameter_paths, replace_modules, root_module
from .nn import LoraLinear

__all__ = ["disable_adapters", "lora_modules", "merge", "merge_and_unload", "trainable_parameter_counts", "unmerge"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def merge(model: ModelT) -> ModelT:
    """Adds every active adapter to its base weight in place: the model then runs at the base model's speed.

    All layers are checked before the first is changed. Should one fail nevertheless, the layers merged before it are
    unmerged, which restores their weights to rounding.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: there is no LoRA layer; a base weight is tied to another module, which would change with it (a
            language model's head and embedding); an adapter is not finite, or so large that the weight might overflow.
        RuntimeError: an adapter is merged already, or disabled.
    """
    layers = _all_lora_modules("merge", model)
    _check_state("merge", layers, merged=False)
    _check_untied(model, layers)
    for path, layer in layers.items():
        _check_finite(path, layer)
    done: list[LoraLinear] = []
    try:
        for layer in layers.values():
            layer.merge()
            done.append(layer)
    except BaseException:
        for layer in reversed(done):
            layer.unmerge()
        raise
    return model


def unmerge(model: ModelT) -> ModelT:
    """Takes every merged adapter out of its base weight again, in place, to rounding.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: there is no LoRA layer.
        RuntimeError: a layer is not merged. The model is then unchanged.
    """
    layers = _all_lora_modules("unmerge", model)
    _check_state("unmerge", layers, merged=True)
    for layer in layers.values():
        layer.unmerge()
    return model


def merge_and_unload(model: ModelT) -> ModelT:
    """Merges the adapters, unless they are merged, and puts each base layer back: the plain model again.

    Parameters keep their ``requires_grad``: the base stays frozen. Errors as in :func:`merge`.

    Returns:
        ``model``, the same object.
    """
    layers = _all_lora_modules("merge_and_unload", model)
    if not all(layer.is_merged for layer in layers.values()):
        merge(model)
    replace_modules(model, {layer: layer.base_layer for layer in layers.values()})
    forget_injection(model)
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context every LoRA layer computes what its base layer computes.

    Modules trained in full (``modules_to_save``) have no base to fall back to and stay as they are.

    Raises:
        RuntimeError: an adapter is merged, so that the base weights are not the base's.
    """
    layers = _all_lora_modules("disable_adapters", model)
    merged = [path for path, layer in layers.items() if layer.is_merged]
    if merged:
        raise RuntimeError(f"disable_adapters: {_some(merged)} merged; call unmerge(model) first")
    active = {layer: layer.active_adapter for layer in layers.values()}
    try:
        for layer in active:
            layer.active_adapter = None
        yield
    finally:
        for layer, name in active.items():
            layer.active_adapter = name


def trainable_parameter_counts(model: nn.Module) -> tuple[int, int]:
    """``(trainable, total)`` numbers of parameter elements; a shared parameter counts once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def _all_lora_modules(caller: str, model: nn.Module) -> dict[str, LoraLinear]:
    layers = dict(lora_modules(root_module(model)))
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no LoRA layer; call inject(model, config) first")
    return layers


def _check_state(caller: str, layers: dict[str, LoraLinear], merged: bool) -> None:
    wrong = [path for path, layer in layers.items() if layer.is_merged != merged]
    if wrong:
        raise RuntimeError(f"{caller}: {_some(wrong)} {'not merged' if merged else 'merged already'}")
    disabled = [path for path, layer in layers.items() if not merged and layer.active_adapter is None]
    if disabled:
        raise RuntimeError(f"{caller}: no adapter is active in {_some(disabled)}; leave disable_adapters first")


def _check_untied(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    paths = parameter_paths(root_module(model))
    for path, layer in layers.items():
        others = [other for other in paths[id(layer.weight)] if other != f"{path}.base_layer"]
        if others:
            raise ValueError(
                f"merge: the weight of {path!r} is also that of {others[0]!r}, which would change with it; untie them "
                "(give one a clone of the weight), or run unmerged"
            )


@torch.no_grad()
def _check_finite(path: str, layer: LoraLinear) -> None:
    """Bounds ``|weight + scaling * B A|`` by Cauchy-Schwarz, which computes no matrix of the weight's size."""
    if layer.weight.numel() == 0:
        return
    adapter = layer.adapters[layer.active_adapter]
    delta = abs(adapter.scaling) * adapter.lora_B.double().norm(dim=1).max() * adapter.lora_A.double().norm(dim=0).max()
    if not math.isfinite(delta):
        raise ValueError(f"merge: the adapter of {path!r} has NaN or infinite values; it cannot be merged")
    low, high = layer.weight.aminmax()
    limit = torch.finfo(layer.weight.dtype).max
    if not max(-float(low), float(high)) + float(delta) <= limit:
        raise ValueError(
            f"merge: the weight of {path!r}, plus an update of up to {float(delta):g}, might not fit "
            f"{layer.weight.dtype} (at most {limit:g}); convert the model to a wider dtype first"
        )


def _some(paths: list[str]) -> str:
    """The first few paths and how many more: models have hundreds of layers."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(map(repr, paths[:3]))}{more}"
