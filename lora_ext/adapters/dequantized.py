"""Replaces the quantised layers of a model by plain ones that contain the merged updates, rounded once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_ext._common.printable import listed
from lora_ext.merging.layers import updates_of
from lora_ext.merging.quantized import copied, updated
from lora_ext.merging.weights import pack_factors
from lora_ext.model.bare_model import BareModel
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter_layer import innermost
from lora_ext.quantized import QuantizedWeight, quantized_weight, why_unsupported


def dequantized(
    caller: str, root: nn.Module, wanted: Mapping[str, tuple[LoraLayer, Collection[str]]], dtype: torch.dtype | None
) -> dict[nn.Module, nn.Module]:
    """Builds a plain layer for every quantised one; the model is unchanged.

    Args:
        wanted: the LoRA layers with quantised weights, by path, and the adapters to merge into each.
        dtype: of the new weights; None: the dtype that they had before they were quantised.

    Returns:
        ``{quantised layer: plain layer}``.

    Raises:
        ValueError: the model has no quantised layer, or one that cannot be dequantised (all are listed); or an element
            would become NaN or infinite.
    """
    bare = BareModel(root)
    found = {path: quantized_weight(module, any_kind=True) for path, module in bare.modules.items()}
    weights = {path: weight for path, weight in found.items() if weight is not None}
    if problems := [f"{path}: {reason}" for path, reason in _problems(bare, weights)]:
        raise ValueError(f"{caller}: dequantize=True cannot dequantise{listed(problems)}")
    if not weights:
        raise ValueError(f"{caller}: dequantize is set, but {type(root).__name__} has no quantised layer; leave it out")
    adapted = {id(innermost(layer)): (path, layer, names) for path, (layer, names) in wanted.items()}
    plain = {}
    for path, weight in weights.items():
        _, layer, names = adapted.get(id(weight.module), (path, None, ()))
        values = weight.dequantize() if layer is None else _merged_values(caller, layer, path, names)
        to = dtype or weight.dtype or _dtype_of(bare, weights)
        rounded = values.to(to)
        if not rounded.isfinite().all():
            raise ValueError(f"{caller}: the weight of {path!r} overflows {to}; pass a wider dtype as dequantize")
        plain[weight.module] = new = weight.dense(rounded)
        for name in sorted({*names} - {*layer.merged_adapters}) if layer is not None else ():
            if "bias" in (factors := layer.factors(name)):
                bias, _, scaling = factors["bias"]
                values = new.bias.float() + scaling * bias.detach().float().view(-1)
                new.bias = nn.Parameter(values.to(new.bias.dtype), requires_grad=False)
    return plain


def forget_quantization(root: nn.Module) -> None:
    """Removes what Transformers notes in a quantised model and its config: the model is saved as a plain one."""
    if (quantizer := getattr(root, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(root)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(root).pop(flag, None)


def _problems(bare: BareModel, weights: Mapping[str, QuantizedWeight]) -> Iterator[tuple[str, str]]:
    for path, module in bare.modules.items():
        if path in weights and "_hf_hook" in vars(module):
            yield path, "accelerate moves its tensors; load the model on one device (device_map)"
        elif reason := weights[path].why_not_quantize() if path in weights else why_unsupported(module):
            yield path, reason


def _merged_values(caller: str, layer: LoraLayer, path: str, names: Collection[str]) -> Tensor:
    """The dequantised weight of ``layer`` before any merge, plus the updates of ``names``: float32."""
    matrix, label = layer.matrices()["weight"], f"the weight of {path!r}"
    all_names = sorted({*names, *layer.merged_adapters})
    updates = updates_of(caller, layer, "weight", matrix, label, all_names)
    if not updates:
        return matrix.quantized.dequantize()
    weight, stored = layer.weight_to_merge(matrix, all_names), None
    if layer._merged is not None and "weight" in layer._merged.matrices:
        stored = copied(weight)
        weight.write(layer._merged.matrices["weight"].record.stored)
    try:
        return updated(caller, weight, *pack_factors(torch.float32, list(updates.values())), label)
    finally:
        if stored is not None:
            weight.write(stored)


def _dtype_of(bare: BareModel, weights: Mapping[str, QuantizedWeight]) -> torch.dtype:
    """The dtype of the model's first plain parameter; float32 without one."""
    for path, module in bare.modules.items():
        for parameter in module._parameters.values() if path not in weights else ():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return torch.float32
