"""Computes a model with adapters from plain tensors: the weights and the adapters multiplied out."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_ext.adapters import lora_modules
from lora_ext.model.adapter_set import adapter_set
from lora_ext.nn import AdapterLayer, LoraLayer

from .calls import CannotTell


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Computes a model's output without gradients."""
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def multiplied_out(model: nn.Module, pristine: nn.Module, x: Tensor) -> Tensor | None:
    """Computes the output of the pristine model after adding the updates of all adapters in use to its weights.

    None if anything except low-rank updates of single modules is in use: fully trained modules, rows, biases, tied
    weights.
    """
    layers = dict(lora_modules(model))
    others = [m for m in model.modules() if isinstance(m, AdapterLayer) and m not in layers.values()]
    adapters = adapter_set(model)
    if others or (adapters is not None and adapters.biases):
        return None
    copied = copy.deepcopy(pristine)
    holders = Counter(id(p) for module in copied.modules() for p in module._parameters.values())
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in layers.values():
        matrices = layer.matrices()
        for key, (A, B, scaling) in _updates(layer):
            matrix = matrices[key]
            path = re.sub(r"(^|\.)base_layer(?=\.|$)", "", paths[id(matrix.owner)]).lstrip(".")
            parameter = getattr(copied.get_submodule(path), matrix.name)
            if holders[id(parameter)] > 1:
                return None
            offset = matrix.view.storage_offset() - getattr(matrix.owner, matrix.name).storage_offset()
            view = parameter.data.as_strided(matrix.view.shape, matrix.view.stride(), offset)
            view += (scaling * B.detach().double() @ A.detach().double()).to(view.dtype)
    return run(copied, x)


def _updates(layer: LoraLayer) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
    """Yields the updates in use in a layer by their matrix: merged ones as they were merged, others as they are."""
    merged = layer._merged
    for name in layer.merged_adapters:
        for key, matrix in merged.matrices.items():
            if name in matrix.ranks:
                yield key, matrix.factors(name, torch.device("cpu"))
    for name in layer.active_adapters:
        if name not in layer.merged_adapters:
            yield from _factors(layer, name)


def _factors(layer: LoraLayer, name: str) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
    try:
        yield from layer.factors(name).items()
    except ValueError:  # the adapter has a bias, the layer has none
        raise CannotTell from None
