"""Layers that read one tensor share its low-rank passes next to quantised base layers, each of which computes its own
product.
"""

from __future__ import annotations

import pytest
import torch
from support.layers import saved_bytes
from support.quantized import QUANTIZE, quantized_copy, unchanged_bytes
from support.shared_inputs import Net, compute_alone, counted_calls, groups, step
from torch import Tensor, nn

from lora_ext import LoraConfig, inject

NAMES = ["q", "k", "v", "o"]
FEW = ["nf4-double", "int8", "torchao-int8"]


def base(format: str, dtype: torch.dtype = torch.float32, skip: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    return quantized_copy(Net(2, 64).to(dtype), format, skip)


def net(format: str, dtype: torch.dtype = torch.float32, skip: tuple[str, ...] = (), **options) -> nn.Module:
    config = {"r": 3, "target_modules": NAMES, "init_lora_weights": False, "lora_dropout": 0.3}
    return inject(base(format, dtype, skip), LoraConfig(**config | options))


def some_x(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 64).to(dtype)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of layers of each call that adds updates to the output of base layers."""
    return counted_calls(monkeypatch, "lora_delta_siblings", "plus_lora_delta")


@pytest.fixture
def each_alone(monkeypatch):
    return lambda: compute_alone(monkeypatch)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        error = (actual[name].float() - tensor.float()).norm()
        assert error <= tolerance * tensor.float().norm(), (name, error, tensor.norm())


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(
    ("format", "dtype"),
    [(format, torch.float32) for format in QUANTIZE]
    + [(format, dtype) for format in FEW for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_results_are_those_of_separate_layers(format, dtype, lora_bias, calls, each_alone):
    model, x = net(format, dtype, lora_bias=lora_bias), some_x(dtype)
    with unchanged_bytes(model):
        first, second = step(model, x), step(model, x)
    assert calls == [4, 1] * 2 + [3, 1] * 2  # o is in the first guess
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert groups(model) == {"qkv"}
    each_alone()
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert_same(first, step(model, x), tolerance)  # with the masks of the layers by themselves
    assert calls[8:] == [1] * 8
    assert len(first) == 2 + 2 * 4 * (3 if lora_bias else 2)


@pytest.mark.parametrize("format", FEW)
def test_autograd_keeps_one_mask_and_one_xa_for_a_group(format):
    def activations(model: nn.Module) -> list[tuple[int, ...]]:
        model(some_x())
        kept = saved_bytes(lambda: model.blocks[0](some_x()))
        return sorted(shape for shape, _ in kept if shape in ((5, 8), (5, 3), (5, 9)))

    config = LoraConfig(r=3, target_modules=NAMES, lora_dropout=0.3)
    assert activations(inject(base(format), config)) == [(5, 3), (5, 8), (5, 8), (5, 9)]
    assert activations(inject(base(format), config, share_inputs=False)) == [(5, 3)] * 4 + [(5, 8)] * 4


def test_what_falls_back(calls):
    model, x, seen = net("nf4", skip=("v",)), some_x(), []
    for block in model.blocks:
        block.k.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    model(x)
    assert len(seen) == 4  # the hooks see their layers' calls, and no others
    assert groups(model) == set()


def test_a_change_between_the_calls_has_effect():
    x = some_x()
    for change in ("eval", "weight", "base_layer"):
        model = net("int8", lora_dropout=0.0)
        model(x)
        block, one = model.blocks[0], x + 0
        block.q(one)
        if change == "eval":
            block.k.base_layer.eval()
        elif change == "weight":
            block.k.base_layer.weight.mul_(0)
        else:
            block.k.base_layer = QUANTIZE["int8"](nn.Linear(64, 64))
        assert torch.equal(block.k(one), block.k(x + 0)), change
