"""Makes layers and models with several adapters, and checks whether their weights changed, for the tests of merging."""

from __future__ import annotations

from collections.abc import Collection

import torch
from support.merging import hard_weight, same_bits, update_factors
from torch import Tensor, nn

from lora_ext.adapters import lora_modules
from lora_ext.nn import LoraAdapter, LoraLinear

NAMES = ("a", "b", "c")


def add_adapter(layer: LoraLinear, name: str, rank: int, size: float) -> None:
    """Adds an adapter whose update has elements of standard deviation ``size``, and makes it active."""
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    A, B, scaling = update_factors(layer.weight, rank, size, dtype)
    adapter = LoraAdapter(layer.in_features, layer.out_features, rank, scaling * rank, dtype=dtype)
    with torch.no_grad():
        adapter.lora_A.copy_(A), adapter.lora_B.copy_(B)
    layer.add_adapter(name, adapter)
    layer.set_active(name)


def hard_layer(dtype: torch.dtype, shape: tuple[int, int] = (9, 270), sizes: Collection[float] = (0.1, 3.0, 1e-4)):
    """Makes a layer of hard weights with adapters a, b, c of ranks 2, 3, 4."""
    base = nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    base.weight.copy_(hard_weight(*shape, dtype))
    layer = LoraLinear(base).eval()
    for rank, (name, size) in enumerate(zip(NAMES, sizes, strict=True), start=2):
        add_adapter(layer, name, rank, size)
    return layer


def hard_model(dtypes: Collection[torch.dtype], sizes: Collection[float] = (0.1, 3.0, 1e-4)) -> nn.ModuleDict:
    """Makes a model with a layer per dtype. All have adapters a and b, and all except the first c."""
    model = nn.ModuleDict({f"layer{i}": hard_layer(dtype, (5 + i, 260), sizes) for i, dtype in enumerate(dtypes)})
    del model["layer0"].adapters["c"]
    return model.eval()


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.clone() for _, layer in lora_modules(model)]


def merged_sets(model: nn.Module) -> list[tuple[str, ...]]:
    return [layer.merged_adapters for _, layer in lora_modules(model)]


def all_same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def assert_restores(model: nn.Module, pristine: list[torch.Tensor]) -> None:
    for _, layer in lora_modules(model):
        if layer.is_merged:
            layer.unmerge()
    assert all_same(weights(model), pristine)
