"""Acts on all the LoRA layers of a model at once: merge, unmerge, disable, unload, count."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ._checks import check_merge_layer
from ._interrupts import uninterrupted
from .exact_merge import merge_all_, pack_factors
from .inject import forget_injection, lora_modules, parameter_paths, replace_modules, root_module
from .nn import LoraAdapter, LoraLinear
from .nn.merged import change_merged, check_is_stored

__all__ = [
    "disable_adapters",
    "lora_modules",
    "merge",
    "merge_and_unload",
    "merge_record_bytes",
    "trainable_parameter_counts",
    "unmerge",
]

_LOGGER = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def merge(model: ModelT, adapter_names: str | Iterable[str] | None = None) -> ModelT:
    """Adds adapters to their base weights in place: the model then runs at the base model's speed.

    Every bit of the weights can be restored (:func:`unmerge`). Where rounding lost bits they are kept, which takes
    0.03 to 0.25 bytes per float32 weight for updates of 0.5 % to 10 % of its size; :func:`merge_record_bytes` says how
    many, and so does an INFO message of the ``lora_ext.adapters`` logger.

    All layers are checked before the first is changed: all of them are merged, or none. Ctrl-C waits for that.

    Args:
        model: holds LoRA layers.
        adapter_names: which adapters, in the layers that have them, beside those merged already; None: the active ones.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: there is no LoRA layer; a base weight is tied to another module, which would change with it (a
            language model's head and embedding), or shares memory with that of another LoRA layer; an element would
            become NaN or infinite.
        KeyError: no layer has an adapter of that name.
        RuntimeError: an adapter is merged already, or disabled; a base weight is computed by a parametrization.
    """
    layers = _all_lora_modules("merge", model)
    wanted = _wanted("merge", layers, adapter_names)
    _check_untied(model, wanted)
    change_merged(
        "merge",
        {layer: {*layer.merged_adapters, *names} for layer, names in wanted.values()},
        {layer: f"the weight of {path!r}" for path, (layer, _) in wanted.items()},
    )
    total = sum(layer.merge_record_bytes for layer, _ in wanted.values())
    per_weight = total / max(sum(layer.weight.numel() for layer, _ in wanted.values()), 1)
    _LOGGER.info("merged %d layers; unmerging keeps %d bytes, %.3f per weight", len(wanted), total, per_weight)
    return model


def unmerge(model: ModelT, adapter_names: str | Iterable[str] | None = None) -> ModelT:
    """Takes merged adapters out of their base weights again, in place.

    Of a layer with none left, every bit of the weight is what it was before the first was merged.

    Args:
        model: holds merged LoRA layers.
        adapter_names: which adapters, in the layers that have them; None: all that are merged.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: there is no LoRA layer.
        KeyError: no layer has an adapter of that name.
        RuntimeError: a layer is not merged, or was converted to another dtype while it was.
        Other errors as :meth:`~lora_ext.nn.LoraLinear.unmerge`. The model is then unchanged.
    """
    layers = _all_lora_modules("unmerge", model)
    names = _names(adapter_names)
    if names is None:
        wanted = {path: (layer, set[str]()) for path, layer in layers.items()}
        wrong = [path for path, layer in layers.items() if not layer.is_merged]
    else:
        # An adapter may have been removed from its layer since it was merged.
        known = {path: {*layer.adapters, *layer.merged_adapters} for path, layer in layers.items()}
        _check_known("unmerge", known, names)
        chosen = {path: layer for path, layer in layers.items() if names & known[path]}
        wanted = {path: (layer, set(layer.merged_adapters) - names) for path, layer in chosen.items()}
        wrong = [path for path, layer in chosen.items() if names & layer.adapters.keys() - {*layer.merged_adapters}]
    if wrong:
        raise RuntimeError(f"unmerge: {_some(wrong)} not merged")
    change_merged(
        "unmerge", dict(wanted.values()), {layer: f"the weight of {path!r}" for path, (layer, _) in wanted.items()}
    )
    return model


def merge_record_bytes(model: nn.Module) -> int:
    """Bytes kept to take merged adapters out again: copies of their factors, and what rounding lost."""
    return sum(layer.merge_record_bytes for _, layer in lora_modules(root_module(model)))


def merge_and_unload(model: ModelT) -> ModelT:
    """Merges the active adapters, unless some are merged, and puts each base layer back: the plain model again.

    Nothing is kept to unmerge by. Parameters keep their ``requires_grad``: the base stays frozen. Errors as in
    :func:`merge`.

    Returns:
        ``model``, the same object.
    """
    layers = _all_lora_modules("merge_and_unload", model)
    merge: list[tuple[str, LoraLinear, LoraAdapter]] = []
    if not all(layer.is_merged for layer in layers.values()):
        wanted = _wanted("merge", layers, None)
        _check_untied(model, wanted)
        merge = [(f"the weight of {path!r}", layer, layer.adapters[name]) for path, (layer, (name,)) in wanted.items()]
    for label, layer, adapter in merge:
        check_is_stored("merge", layer, label)
        check_merge_layer(f"merge: {label}", layer.weight, adapter.lora_A, adapter.lora_B)
    factors = [
        pack_factors(layer.weight.dtype, [(adapter.lora_A, adapter.lora_B, adapter.scaling)])
        for _, layer, adapter in merge
    ]
    with uninterrupted():  # a weight that contains its adapter must not stay beside it
        merge_all_(
            "merge",
            [layer.weight for _, layer, _ in merge],
            [A for A, _ in factors],
            [B for _, B in factors],
            [label for label, _, _ in merge],
            record=False,
        )
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


def _names(adapter_names: str | Iterable[str] | None) -> set[str] | None:
    return {adapter_names} if isinstance(adapter_names, str) else None if adapter_names is None else set(adapter_names)


def _check_known(caller: str, by_layer: Mapping[str, Collection[str]], names: set[str]) -> None:
    known = {name for own in by_layer.values() for name in own}
    if unknown := names - known:
        raise KeyError(f"{caller}: no layer has an adapter {sorted(unknown)[0]!r}; the adapters are {sorted(known)}")


def _wanted(
    caller: str, layers: dict[str, LoraLinear], adapter_names: str | Iterable[str] | None
) -> dict[str, tuple[LoraLinear, set[str]]]:
    """What is to be merged: the layers that have the adapters, and the names, none of them merged yet."""
    names = _names(adapter_names)
    if names is None:
        merged = [path for path, layer in layers.items() if layer.is_merged]
        if merged:
            raise RuntimeError(f"{caller}: {_some(merged)} merged already")
        disabled = [path for path, layer in layers.items() if layer.active_adapter is None]
        if disabled:
            raise RuntimeError(f"{caller}: no adapter is active in {_some(disabled)}; leave disable_adapters first")
        return {path: (layer, {layer.active_adapter}) for path, layer in layers.items()}
    _check_known(caller, {path: layer.adapters.keys() for path, layer in layers.items()}, names)
    wanted = {path: (layer, own) for path, layer in layers.items() if (own := names & layer.adapters.keys())}
    merged = [path for path, (layer, own) in wanted.items() if own & {*layer.merged_adapters}]
    if merged:
        raise RuntimeError(f"{caller}: {_some(merged)} merged already")
    return wanted


def _check_untied(model: nn.Module, wanted: dict[str, tuple[LoraLinear, set[str]]]) -> None:
    paths = parameter_paths(root_module(model))
    for path, (layer, _) in wanted.items():
        others = [other for other in paths[id(layer.weight)] if other != f"{path}.base_layer"]
        if others:
            raise ValueError(
                f"merge: the weight of {path!r} is also that of {others[0]!r}, which would change with it; untie them "
                "(give one a clone of the weight), or run unmerged"
            )


def _some(paths: list[str]) -> str:
    """The first few paths and how many more: models have hundreds of layers."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(map(repr, paths[:3]))}{more}"
