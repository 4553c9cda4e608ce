"""Several active adapters of a layer are one update where they can be (lora_ext/nn/joined.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.layers import relative_error
from torch import Tensor, nn

from lora_ext import LoraConfig, functional, inject, set_adapter
from lora_ext.nn import LoraMultiheadAttention
from lora_ext.nn.joined import Update, joined

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(96, 80),
    "hooked": lambda: hooked(nn.Linear(96, 80)),
    "conv": lambda: nn.Conv1d(96, 80, 3),
    "grouped conv": lambda: nn.Conv1d(96, 80, 3, groups=2),
    "embedding": lambda: nn.Embedding(50, 80),
    "attention": lambda: nn.MultiheadAttention(96, 4, batch_first=True),
    "separate attention": lambda: nn.MultiheadAttention(96, 4, kdim=32, vdim=32, batch_first=True),
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
    x = torch.randn(2, 32, 96).to(dtype)
    if "attention" not in kind:
        return (x,)
    return x, *(x[..., :32] if "separate" in kind else x for _ in range(2))


@pytest.mark.parametrize("number", [2, 8, 16])
def test_the_sum_is_rounded_once(number):
    """In 16 bits: the error is at most twice that of one sum in float32, rounded at the end."""
    model = with_adapters(nn.Linear(384, 384).bfloat16(), number * [{"r": 8, "lora_alpha": 16}])
    layer, x = model["layer"], torch.randn(64, 384).bfloat16()
    y, total = layer.base_layer(x).float(), layer.base_layer.double()(x.double())
    for adapter in layer.adapters.values():
        A, B = adapter.lora_A, adapter.lora_B
        y = y + adapter.scaling * (x.float() @ A.T @ B.T)
        total = total + adapter.scaling * (x.double() @ A.double().T @ B.double().T)
    plain = relative_error(y.bfloat16(), total)
    layer.base_layer.bfloat16()
    assert relative_error(layer(x), total) <= 2 * plain


@pytest.mark.parametrize("kind", ["conv", "embedding", "hooked"])
def test_other_layers_round_once_for_all_adapters(kind):
    """Not more often for sixteen adapters than for one with all of their ranks."""
    errors = []
    for configs in (16 * [{"r": 4, "lora_alpha": 8}], [{"r": 64, "lora_alpha": 128}]):
        model = with_adapters(LAYERS[kind]().bfloat16(), configs)
        inputs = inputs_of(kind, torch.bfloat16)
        doubled = [x.double() if x.is_floating_point() else x for x in inputs]
        exact = copy.deepcopy(model).double()["layer"](*doubled)
        errors.append(relative_error(model["layer"](*inputs), exact))
    assert errors[0] <= 1.3 * errors[1]


def output_with(model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> Tensor:
    """Returns the output with the adapters ``names``; of an attention, its projections, to which they add."""
    layer = model["layer"]
    if isinstance(layer, LoraMultiheadAttention):
        return torch.cat([projection.flatten() for projection in layer._project(inputs, None, names)])
    if not names:
        return layer.base_layer(*inputs)
    set_adapter(model, names)
    return layer(*inputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_are_those_of_the_sum(kind):
    """Of different ranks and scalings: the output is the base layer's plus what each adapter adds alone."""
    configs = [{"r": 2, "lora_alpha": 6}, {"r": 6, "lora_alpha": 3}, {"r": 4, "lora_alpha": 1}, {"r": 4}]
    model = with_adapters(LAYERS[kind]().double(), configs)
    inputs, names = inputs_of(kind, torch.float64), ("0", "1", "2", "3")
    base = output_with(model, inputs, ()).detach()
    expected = base + sum(output_with(model, inputs, (name,)) - base for name in names)
    y = output_with(model, inputs, names)
    torch.testing.assert_close(y, expected)
    factors = [p for name, p in model.named_parameters() if ".adapters." in name and ".out_proj." not in name]
    grad_y = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(one, factors, grad_y) for one in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", ["plain", "hooked"])
def test_compiles_as_one_graph(way):
    configs = [{"r": 2}, {"r": 3, "lora_alpha": 5}, {"r": 4, "lora_dropout": 0.5}]
    model = with_adapters(nn.Linear(6, 5), configs)
    if way == "hooked":
        hooked(model["layer"].base_layer)
    x = torch.randn(40, 6)
    compiled = torch.compile(model["layer"], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model["layer"](x))


def update(r: int, scaling: float = 1.0, dropout_p: float = 0.0, dtype: torch.dtype = torch.float32) -> Update:
    return Update(torch.randn(r, 6).to(dtype), torch.randn(5, r).to(dtype), scaling, dropout_p)


@pytest.mark.parametrize(
    "updates, ranks",
    [
        ([], []),
        ([update(3)], [3]),
        ([update(3), update(2)], [5]),
        ([update(3, 0.5), update(2, -2.0), update(1, 0.0)], [6]),
        ([update(3, 0.0), update(2, 0.0)], [5]),
        ([update(3), update(2, dropout_p=0.5), update(4), update(1, dropout_p=0.5)], [7, 3]),
        ([update(3), update(2, dtype=torch.float64), update(4)], [7, 2]),
        ([update(3, 2.0, dtype=torch.bfloat16), update(2, dtype=torch.bfloat16)], [3, 2]),
        ([update(3, 2.0, dtype=torch.bfloat16), update(2, 2.0, dtype=torch.bfloat16)], [5]),
    ],
    ids=lambda value: "",
)
def test_what_is_joined(updates, ranks):
    found = joined(updates)
    assert [len(one.lora_A) for one in found] == ranks
    before, after = (
        sum(u.scaling * u.lora_B.double() @ u.lora_A.double() for u in several) for several in (updates, found)
    )
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert len(updates) != 1 or found[0] is updates[0]


def test_one_op_computes_all(monkeypatch):
    calls, fused = [], functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *arguments: calls.append(arguments) or fused(*arguments))
    monkeypatch.setattr(functional, "plus_lora_delta", None)
    model = with_adapters(nn.Linear(6, 5), [{"r": 2}, {"r": 3, "lora_alpha": 5}])
    model["layer"](torch.randn(4, 6))
    assert [tuple(call[3].shape) for call in calls] == [(5, 6)]
