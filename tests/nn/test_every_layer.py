"""What holds for layers of every kind: gradients, several adapters, merging, copies, graphs, combinations, autocast."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.merging import same_bits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import add_weighted_adapter, disable_adapters, lora_modules, merge_and_unload, unload

pytestmark = pytest.mark.cpu_only("makes its inputs on the CPU")


class Attends(nn.Module):
    """Passes one tensor, or three of other sizes, to an attention."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x, x[..., :6], x[..., :6]) if self.attention.kdim == 6 else (x, x, x)
        return self.attention(*parts)[0]


class Uses(nn.Module):
    """Multiplies by three experts, in either layout, and by a matrix."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((3, 8, 5) if is_transposed else (3, 5, 8)) / 3)
        self.mix = nn.Parameter(torch.randn(6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.up if self.is_transposed else self.up.mT)).sum(0) @ self.mix.T


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    options: dict[str, Any]
    shape: tuple[int, ...] = (4, 8)


WITH_BIAS = {"target_modules": ["0"], "lora_bias": True}
PACKED = {"target_modules": ["0"], "enable_lora": {"0": (True, False, True)}}
KINDS = {
    "linear": Kind(lambda: nn.Linear(8, 6), WITH_BIAS),
    "conv1d": Kind(lambda: Conv1D(6, 8), {"target_modules": ["0"]}),
    "packed": Kind(lambda: nn.Linear(8, 6), PACKED),
    "packed conv1d": Kind(lambda: Conv1D(6, 8), PACKED),
    "embedding": Kind(lambda: nn.Embedding(20, 8), {"target_modules": ["0"]}),
    "conv": Kind(
        lambda: nn.Conv2d(8, 6, (3, 2), padding=1), {"target_modules": ["0"], "lora_bias": True}, (2, 8, 5, 4)
    ),
    "attention": Kind(Attends, {"target_modules": ["attention"], "lora_bias": True}, (2, 5, 8)),
    "separate attention": Kind(lambda: Attends(kdim=6, vdim=6), {"target_modules": ["attention"]}, (2, 5, 8)),
    "experts": Kind(lambda: Uses(False), {"target_parameters": ["0.up", "0.mix"]}),
    "transposed experts": Kind(lambda: Uses(True), {"target_parameters": ["0.up", "0.mix"]}),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


def adapted(kind: Kind, *names: str, dtype: torch.dtype = torch.float64, model: nn.Module | None = None) -> nn.Module:
    """A model with adapters ``names`` of different ranks, all in use."""
    torch.manual_seed(0)
    model = nn.Sequential(kind.make()).to(dtype) if model is None else model
    for i, name in enumerate(names or ("default",)):
        options = {"r": 2 + i, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []} | kind.options
        inject(model, LoraConfig(**options), name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("lora_bias"):
            nn.init.normal_(parameter)
    set_adapter(model, list(names or ("default",)))
    return model.eval()


def input_for(kind: Kind, dtype: torch.dtype = torch.float64) -> Tensor:
    if kind.make().__class__ is nn.Embedding:
        return torch.randint(20, kind.shape)
    return torch.randn(kind.shape).to(dtype)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".adapters." not in name}


def test_gradients_of_the_factors(kind):
    model, x = adapted(kind, "a", "b"), input_for(kind)
    trained = {name: p.requires_grad_() for name, p in model.named_parameters() if ".adapters." in name}

    def output(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, tuple(trained.values()))


def test_sets_of_adapters_compute_what_their_merged_weights_do(kind):
    model, x = adapted(kind, "a", "b", "c"), input_for(kind)
    outputs = []
    for names in (["a"], ["b"], ["c", "a"], ["a", "b", "c"]):
        set_adapter(model, names)
        outputs.append(model(x))
        torch.testing.assert_close(outputs[-1], merge_and_unload(copy.deepcopy(model))(x))
    bare = unload(copy.deepcopy(model))(x)
    assert all(not torch.allclose(one, other) for one in outputs for other in (bare, *outputs) if one is not other)
    with disable_adapters(model):
        assert torch.equal(model(x), bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerging_restores_every_bit(kind, dtype):
    model, x = adapted(kind, "a", "b", dtype=dtype), input_for(kind, dtype)
    pristine, expected = {name: p.clone() for name, p in frozen(model).items()}, model(x)
    merge(model, "b")
    half = model(x)  # one merged, one not
    merge(model, "a")
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close([half, model(x)], [expected, expected], **tolerance)
    changed = [name for name, p in frozen(model).items() if not same_bits(p, pristine[name])]
    assert changed and all("base_layer" in name for name in changed)
    with pytest.raises(RuntimeError, match="merged and would not train"):
        model.train()(x)
    unmerge(model.eval(), "b")
    unmerge(model)
    assert all(same_bits(p, pristine[name]) for name, p in frozen(model).items())
    assert torch.equal(model(x), expected)


def test_frozen_values_are_neither_written_nor_trained(kind):
    model, x = adapted(kind, dtype=torch.bfloat16).train(), input_for(kind, torch.bfloat16)
    before = {name: (p.clone(), p._version) for name, p in frozen(model).items()}
    model(x).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in before), name
    for name, parameter in frozen(model).items():
        value, version = before[name]
        assert same_bits(parameter, value) and parameter._version == version


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_apart(kind, how):
    model, x = adapted(kind), input_for(kind)
    bases = [part for part in model.modules() if type(part) in (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d, Uses)]
    twin, expected = how(model), model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(model(x), expected)
    plain = unload(model)
    assert all(any(part is base for part in plain.modules()) for base in bases) and not list(lora_modules(plain))


def test_a_combination_and_its_file(kind, tmp_path):
    model, x = adapted(kind, "a"), input_for(kind)
    base = unload(copy.deepcopy(model))
    inject(model, LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": []} | kind.options), "b")
    set_adapter(add_weighted_adapter(model, ["a", "b"], [0.5, 2.0], "c", "linear"), "c")
    expected = model.eval()(x)
    torch.testing.assert_close(merge_and_unload(copy.deepcopy(model))(x), expected)
    save_adapter(model, tmp_path, "c")
    torch.testing.assert_close(load_adapter(base, tmp_path)(x), expected)


def test_compiles_as_one_graph(kind):
    model, x = adapted(kind, "a", "b", dtype=torch.float32), input_for(kind, torch.float32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_autocast(kind):
    model, x = adapted(kind, dtype=torch.float32), input_for(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None for name, p in model.named_parameters() if ".adapters." in name)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["linear", "conv1d", "packed", "embedding", "conv"])
def test_what_a_hook_saw_is_not_overwritten(name):
    model, x, seen = adapted(KINDS[name]), input_for(KINDS[name]), []
    expected = model(x)
    model[0].base_layer.register_forward_hook(lambda module, inputs, y: seen.append((y, y.clone())))
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(*seen[0]) and not torch.equal(seen[0][0], expected)
