"""A small model whose layers read one tensor, what a step of it computes, and a report of its groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, functional, inject
from lora_ext.adapters import input_groups
from lora_ext.nn.shared_inputs import Neighbours

WIDTH = 8


class Attention(nn.Module):
    """Like an attention: o has as many in_features as q, k and v, and reads another tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return self.o(torch.softmax(self.q(x) * self.k(memory), -1) + self.v(memory))


class Net(nn.Module):
    def __init__(self, layers: int = 1, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width) for _ in range(layers))

    def forward(self, x: Tensor, run: Callable = lambda block, x: block(x)) -> Tensor:
        for block in self.blocks:
            x = run(block, x + 0)
        return x


def net(
    layers: int = 1,
    share_inputs: bool = True,
    format: str | None = None,
    dtype: torch.dtype = torch.float32,
    skip: tuple[str, ...] = (),
    **options: Any,
) -> Net:
    """A model with adapters; ``format``: of its quantised weights, except those of the layers ``skip``."""
    torch.manual_seed(0)
    model = Net(layers, width_of(format)).to(dtype)
    if format is not None:
        from support.quantized import quantized_copy  # skips the test where its library is not installed

        model = quantized_copy(model, format, skip)
    config = LoraConfig(**{"target_modules": ["q", "k", "v", "o"], "r": 2, "init_lora_weights": False} | options)
    return inject(model, config, share_inputs=share_inputs)


def width_of(format: str | None) -> int:
    return WIDTH if format is None else 64  # what the formats need


def some_x(format: str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return torch.randn(5, width_of(format), generator=generator).to(dtype)


def step(
    model: nn.Module, x: Tensor, run: Callable | None = None, compiled: Callable | None = None
) -> dict[str, Tensor]:
    """The output and all gradients of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = (model if compiled is None else compiled)(x, *() if run is None else (run,))
    y.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


assert_close = torch.testing.assert_close


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compares the norms of the differences."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        error = (actual[name].double() - tensor.double()).norm()
        assert error <= tolerance * tensor.double().norm(), (name, error, tensor.norm())


def groups(model: nn.Module) -> set[str]:
    """The last names of the layers of each group that is computed together."""
    return {"".join(path[-1] for path in paths) for paths in input_groups(model).together}


def counted_calls(monkeypatch: pytest.MonkeyPatch, siblings: str, single: str) -> list[int]:
    """Returns a list that grows by the number of layers of each call of two functions of ``functional``."""
    found: list[int] = []

    def counted(name: str, layers: Callable[..., int]) -> None:
        function = getattr(functional, name)

        def call(*arguments: Any) -> Any:
            found.append(layers(*arguments))
            return function(*arguments)

        monkeypatch.setattr(functional, name, call)

    counted(siblings, lambda *arguments: len(next(part for part in arguments if isinstance(part, (list, tuple)))))
    counted(single, lambda *arguments: 1)
    return found


def compute_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every layer compute its own output from now on; dropout seeds stay common."""
    monkeypatch.setattr(Neighbours, "group_of", lambda *_: frozenset())
