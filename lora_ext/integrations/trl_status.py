"""The status of an injected model's adapters in the form of PEFT's ``get_layer_status`` and ``get_model_status``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.peft_model import TunerLayerStatus, TunerModelStatus
from torch import nn

from lora_ext.adapters import adapter_status, trainable_parameter_counts
from lora_ext.model.adapter_set import find_adapters
from lora_ext.model.bare_model import adapter_layers, root_module
from lora_ext.quantized import quantized_weight

_IRREGULAR = "irregular"


def layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One entry for each adapter layer; names begin at the wrapper's ``base_model``, as PEFT's do."""
    active = find_adapters(model, "get_layer_status").active
    entries: dict[str, list[Any]] = {}
    for entry in adapter_status(model):
        entries.setdefault(entry.layer, []).append(entry)
    layers = dict(adapter_layers(model))
    return [
        TunerLayerStatus(
            name=f"model.{path}",
            module_type=f"lora_ext.{held[0].kind}",
            enabled=not active.is_disabled,
            active_adapters=[entry.adapter for entry in held if entry.active],
            merged_adapters=[entry.adapter for entry in held if entry.merged],
            requires_grad={entry.adapter: _IRREGULAR if entry.trainable is None else entry.trainable for entry in held},
            available_adapters=sorted(entry.adapter for entry in held),
            devices={entry.adapter: [] if entry.device is None else [entry.device.type] for entry in held},
            quantization_backend=_format(layers[path].base_layer),
        )
        for path, held in entries.items()
    ]


def model_status(model: nn.Module, wrapper: nn.Module) -> TunerModelStatus:
    layers = layer_status(model)
    adapters = find_adapters(model, "get_model_status")
    trainable, total = trainable_parameter_counts(model)
    merged = {name for layer in layers for name in layer.merged_adapters}
    waits = any(merged & {*layer.available_adapters} - {*layer.merged_adapters} for layer in layers)
    return TunerModelStatus(
        base_model_type=type(root_module(model)).__name__,
        adapter_model_type=type(wrapper).__name__,
        peft_types=dict.fromkeys(adapters.configs, "LORA"),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=not adapters.active.is_disabled,
        active_adapters=list(adapters.active.names),
        merged_adapters=_IRREGULAR if waits else sorted(merged),
        requires_grad={
            name: _one_of(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in adapters.configs
        },
        available_adapters=sorted(adapters.configs),
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())})
            for name in adapters.configs
        },
        quantization_backend=_one_of(layer.quantization_backend for layer in layers),
    )


def _one_of(values: Iterable[Any]) -> Any:
    """The value that all have, or PEFT's word for several."""
    first, *others = {*values} or {False}
    return _IRREGULAR if others else first


def _format(layer: nn.Module) -> str | None:
    weight = quantized_weight(layer)
    return None if weight is None else weight.name
