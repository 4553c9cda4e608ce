"""Models with adapters for rows that name them, and what a call with one adapter computes."""

from __future__ import annotations

from support.models import shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, set_adapter

RANKS = {"a": 2, "b": 5, "c": 3}


def with_adapters(model: nn.Module, targets: list[str], same: bool = False, **options) -> nn.Module:
    """Adds adapters a, b and c, of different ranks, scalings and targets; c lacks the last target unless ``same``."""
    for name, r in RANKS.items():
        mine = targets if same or name != "c" else targets[:-1] or targets
        config = {"r": r, "lora_alpha": 2 * r + len(name), "target_modules": mine, "init_lora_weights": False}
        inject(model, LoraConfig(**config | options), name)
    return shaken(model).eval()


def use(model: nn.Module, name: str) -> nn.Module:
    """Activates what a row that names ``name`` uses."""
    return set_adapter(model, [] if name == "__base__" else name)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients that are not zero, by parameter."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
