"""functional.lora_linear, lora_grouped_ and lora_grouped_linear skip the dispatcher where nothing else sees them.

Autocast, transforms and forward mode see them: test_machinery.py and test_transforms.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import ClassVar

import pytest
import torch
from support.op_table import HERE, OPS, linear
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext import functional


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
    for state in (partial(torch.autocast, HERE.type, dtype=torch.bfloat16), DispatchMode, nullcontext):
        y = functional.lora_linear(**sample.call)
        with state() as mode:
            (grad,) = torch.autograd.grad(y, A, sample.grads)
        assert torch.equal(grad, expected)
        if isinstance(mode, DispatchMode):
            assert "lora_ext.lora_linear_backward.default" in mode.seen
