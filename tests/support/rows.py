"""Models with adapters for rows that name them, and what a call with one adapter computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.models import shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, set_adapter

RANKS = {"a": 2, "b": 5, "c": 3}
NAMES = ["b", "__base__", "a", "b", "c"]


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


def alone(model: nn.Module, name: str, call: Callable[[], Tensor]) -> Tensor:
    """Returns what ``call`` gives if all rows use the adapter ``name``."""
    use(model, name)
    return call()


def assert_rows_equal(model: nn.Module, call: Callable[..., Tensor], names: list[str] = NAMES, **tolerance) -> None:
    """Checks that each row of ``call`` equals the row of a call with its adapter alone; and that they differ."""
    active = model._lora_adapters.active.names
    y = call(adapter_names=names)
    for name in dict.fromkeys(names):
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        expected = alone(model, name, call)
        torch.testing.assert_close(y[rows], expected[rows], **tolerance)
        torch.testing.assert_close(call(adapter_names=[name] * len(names)), expected, **tolerance)
        other = alone(model, "a" if name == "b" else "b", call)
        assert not torch.allclose(y[rows], other[rows], atol=1e-5)
    set_adapter(model, active)
    active = model._lora_adapters.active
    assert active.running.choice is None and active.mixed_calls == 0


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients that are not zero, by parameter."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
