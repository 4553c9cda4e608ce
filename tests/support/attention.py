"""A model with an attention, its adapted copies and inputs, for the tests of LoraMultiheadAttention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import lora_modules, unload

E, H, N, L, S = 12, 3, 2, 5, 4
ALIVE = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}


class Wrapper(nn.Module):
    """A model whose ``attention`` is an ``nn.MultiheadAttention``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **{"dtype": torch.float64} | settings)
        with torch.no_grad():
            for name, parameter in self.attention.named_parameters():
                if "bias" in name:  # initially zero
                    parameter.normal_()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(*args, **kwargs)


def encoder(**settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not layer.norm_first)


def adapted(base: nn.Module, targets: list[str] | str = ("attention",), name: str = "default", **settings) -> nn.Module:
    return inject(base, LoraConfig(**{"target_modules": targets} | ALIVE | settings), name)


def merged_copy(model: Wrapper) -> Wrapper:
    """The plain model with the active adapters' updates added to its weights."""
    plain = copy.deepcopy(model)
    for _, layer in lora_modules(plain):
        for name in layer.active_adapters:
            for key, (A, B, scaling) in layer.factors(name).items():
                layer.matrices()[key].view.add_((scaling * B @ A).detach())
    return unload(plain)


def inputs(kind: str, batch_first: bool, batched: bool) -> tuple[Tensor, ...]:
    def tensor(length: int) -> Tensor:
        shape = (length, E) if not batched else (N, length, E) if batch_first else (length, N, E)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = tensor(L)
    if kind == "self":
        return query, query, query
    key = tensor(S)
    return query, key, key if kind == "memory" else tensor(S)


def assert_same(ours: nn.Module, plain: nn.Module, tensors: tuple[Tensor, ...], **kwargs: Any) -> None:
    """Outputs, attention weights and the gradients of the inputs."""
    results = []
    for model in (ours, plain):
        torch.manual_seed(3)
        y, weights = model(*tensors, **kwargs)
        torch.manual_seed(4)
        loss = (y * torch.randn(y.shape)).sum()
        loss = loss if weights is None else loss + (weights * torch.randn(weights.shape)).sum()
        leaves = list(dict.fromkeys(tensors))
        results.append((y, weights, torch.autograd.grad(loss, leaves)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
