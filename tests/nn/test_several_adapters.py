"""Several active adapters of a layer are one update where they can be (lora_ext/nn/updates.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.layers import relative_error
from torch import Tensor, nn

from lora_ext import LoraConfig, functional, inject, set_adapter

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(96, 80),
    "hooked": lambda: hooked(nn.Linear(96, 80)),
    "conv": lambda: nn.Conv1d(96, 80, 3),
    "embedding": lambda: nn.Embedding(50, 80),
}


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, arguments, y: None)
    return layer


def with_adapters(base: nn.Module, configs: list[dict]) -> nn.Module:
    model = nn.ModuleDict({"layer": base})
    for i, options in enumerate(configs):
        inject(model, LoraConfig(**{"target_modules": ["layer"], "init_lora_weights": False} | options), str(i))
    set_adapter(model, [str(i) for i in range(len(configs))])
    return model.eval()


def inputs_of(kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if kind == "embedding":
        return (torch.randint(50, (64,)),)
    if "conv" in kind:
        return (torch.randn(2, 96, 34).to(dtype),)
    return (torch.randn(2, 32, 96).to(dtype),)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_round_once_for_all_adapters(kind):
    """Not more often for sixteen adapters than for one with all of their ranks."""
    errors = []
    for configs in (16 * [{"r": 4, "lora_alpha": 8}], [{"r": 64, "lora_alpha": 128}]):
        model = with_adapters(LAYERS[kind]().bfloat16(), configs)
        inputs = inputs_of(kind, torch.bfloat16)
        doubled = [x.double() if x.is_floating_point() else x for x in inputs]
        exact = copy.deepcopy(model).double()["layer"](*doubled)
        errors.append(relative_error(model["layer"](*inputs), exact))
    assert errors[0] <= 1.3 * errors[1]


@pytest.mark.parametrize(
    ("dtype", "alphas", "rank"),
    [
        (torch.float32, (2, 5), 5),
        (torch.bfloat16, (2, 3), 5),
        (torch.bfloat16, (2, 5), 2),  # a ratio of scalings would round the factors
    ],
    ids=str,
)
def test_one_op_computes_all_that_can_be_joined(dtype, alphas, rank, monkeypatch):
    calls, fused = [], functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *arguments: calls.append(arguments) or fused(*arguments))
    configs = [{"r": r, "lora_alpha": alpha} for r, alpha in zip((2, 3), alphas, strict=True)]
    model = with_adapters(nn.Linear(6, 5), configs)
    model["layer"].adapters.to(dtype)
    if rank == 5:
        monkeypatch.setattr(functional, "plus_lora_delta", None)
    model["layer"](torch.randn(4, 6))
    assert [tuple(call[3].shape) for call in calls] == [(rank, 6)]
