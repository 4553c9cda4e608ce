"""functional.lora_linear, lora_grouped_ and lora_grouped_linear skip the dispatcher where nothing else sees them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from support.op_table import OPS, linear
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_ext import functional
from lora_ext._ops import linear as of_linear
from lora_ext._ops.fast_path import takes_fast_path
from lora_ext.nn import LoraAdapter, LoraLinear


class Subclass(Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


class Recorder:
    """Records what a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def record(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionMode(Recorder, TorchFunctionMode):
    __torch_function__ = Recorder.record


class DispatchMode(Recorder, TorchDispatchMode):
    __torch_dispatch__ = Recorder.record


STATES = {
    "autocast": lambda: torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "dispatch mode": DispatchMode,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.parametrize("state", STATES)
def test_other_states_are_noticed(state):
    assert takes_fast_path()
    with STATES[state]():
        assert not takes_fast_path()
    assert takes_fast_path()


def test_transforms_are_noticed():
    states = []
    torch.func.vmap(lambda x: (states.append(takes_fast_path()), x)[1])(torch.zeros(2))
    torch.func.grad(lambda x: (states.append(takes_fast_path()), x)[1])(torch.zeros(()))
    with torch.autograd.forward_ad.dual_level():
        states.append(takes_fast_path())
    assert states == [False, False, False]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ["lora_linear", "lora_grouped_", "lora_grouped_linear"])
def test_modes_and_subclasses_see_the_op(name, trains):
    op = OPS[name]
    call = op.small().call
    leaf = call["lora_A"] if "lora_A" in call else call["lora_As"][0]
    leaf.requires_grad_(trains)
    seen_as = "lora_grouped_" if trains and name == "lora_grouped_linear" else name  # its two parts

    def output(**call) -> Tensor:
        if "y" not in call:
            return op.run(**call)[0]
        y = call["y"].clone()
        functional.lora_grouped_(**call | {"y": y})
        assert y._version == 1  # a change that autograd must know of
        return y

    expected = output(**call)
    for mode in (FunctionMode(), DispatchMode()):
        with mode:
            y = output(**call)
        assert torch.equal(y, expected) and y.requires_grad == trains
        assert any(seen_as in name for name in mode.seen)
    Subclass.seen.clear()
    y = output(**call | {"x": call["x"].as_subclass(Subclass)})
    assert torch.equal(y.as_subclass(Tensor), expected) and y.requires_grad == trains
    assert any(seen_as in name for name in Subclass.seen)


def test_a_tensor_left_by_a_transform_keeps_its_gradient():
    call, left = linear().call, []
    x = call["x"].clone().requires_grad_()
    torch.func.grad(lambda z: (left.append(x * 1 + 0 * z), z.sum())[1])(torch.zeros_like(x))
    losses = [functional.lora_linear(**call | {"x": tensor}).square().sum() for tensor in (left[0], x * 1)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, x) for loss in losses))


def test_backward_under_autocast_and_modes_as_before():
    sample = linear()
    A = sample.call["lora_A"].requires_grad_()
    (expected,) = torch.autograd.grad(functional.lora_linear(**sample.call), A, sample.grads)
    for state in (STATES["autocast"], DispatchMode, nullcontext):
        y = functional.lora_linear(**sample.call)
        with state() as mode:
            (grad,) = torch.autograd.grad(y, A, sample.grads)
        assert torch.equal(grad, expected)
        if isinstance(mode, DispatchMode):
            assert "lora_ext.lora_linear_backward.default" in mode.seen


def test_seeds_follow_pytorch_s_generator():
    layer = LoraLinear(nn.Linear(8, 8), LoraAdapter(8, 8, 2, 4, 0.5, init_lora_weights=False))
    x = torch.randn(3, 8)
    torch.manual_seed(7)
    first = [layer(x) for _ in range(3)]
    torch.manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer(x)
    second = [layer(x) for _ in range(3)]
    assert all(map(torch.equal, first, second)) and not torch.equal(first[0], first[1])

    def trunk(x: Tensor) -> Tensor:
        return layer(torch.tanh(layer(x)))

    results = []
    for run in (trunk, lambda x: checkpoint(trunk, x, use_reentrant=False)):
        torch.manual_seed(7)
        y = run(x)
        torch.rand(5)  # the generator goes on before the recomputation
        results.append(torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad]))
    assert all(map(torch.equal, *results))


def test_the_functions_that_are_called_are_the_op_s():
    assert of_linear.lora_linear.__self__.overload is torch.ops.lora_ext.lora_linear.default
