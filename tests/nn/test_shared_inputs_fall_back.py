"""Layers that read one tensor: when each is computed alone, and that no result depends on it."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from support.shared_inputs import WIDTH, groups, net, some_x, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext import LoraConfig, inject, merge, set_adapter, unmerge
from lora_ext.adapters import delete_adapter, disable_adapters
from lora_ext.nn.input_groups import ANOTHER_WAY


def test_hooks_of_a_layer_see_its_calls():
    model, x, seen = net(), some_x(), []
    model(x)
    block = model.blocks[0]
    block.k.register_forward_hook(lambda module, inputs, y: seen.append((inputs[0], y)))
    plain = block.k(x + 0)
    seen.clear()
    one = x + 0
    block(one)
    assert seen[0][0] is one
    torch.testing.assert_close(seen[0][1], plain)


@pytest.mark.parametrize("changes", ["x", "a copy", "in place", "factor", "output"])
def test_hooks_that_change_something_have_effect(changes, each_alone):
    model, x = net(), some_x()
    model(x)
    k = model.blocks[0].k
    hooks = {
        "x": lambda _, inputs: (inputs[0] * 2,),
        "a copy": lambda _, inputs: (inputs[0].clone(),),
        "in place": lambda _, inputs: (inputs[0].mul_(2),),
        "factor": lambda module, inputs: (inputs[0], module.adapters.default.lora_A.mul_(2))[:1],
    }
    if changes == "output":
        k.register_forward_hook(lambda module, inputs, y: y * 2)
    else:
        k.register_forward_pre_hook(hooks[changes])
    other = copy.deepcopy(model)
    with torch.no_grad():
        together = [model(x), model(x), model(x)]
        each_alone()
        alone = [other(x), other(x), other(x)]
    torch.testing.assert_close(together, alone)


def test_hooks_of_a_base_layer_are_called(calls):
    model, x, seen = net(), some_x(), []
    block = model.blocks[0]
    block.k.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    model(x)
    assert seen == [1, 1]
    assert calls[-2:] == [2, 1]  # q and v, o; the adapter of k is added to its base layer's output
    assert groups(model)["k"] == ANOTHER_WAY
    assert groups(model)["qv"] == ""


def test_other_dropout(calls):
    model = net(lora_dropout=0.3)
    model.blocks[0].v.adapters.default.lora_dropout = 0.0
    model(some_x())
    model(some_x())
    assert calls[-3:] == [2, 1, 1]
    assert groups(model)["v"] == ANOTHER_WAY


def test_several_adapters(calls):
    model, x = net(), some_x()
    inject(model, LoraConfig(target_modules=["q", "k"], init_lora_weights=False, r=3), "second")
    alone = copy.deepcopy(model)
    for layer in alone.modules():
        vars(layer).pop("_neighbours", None)
    for names in (["second"], ["default"], ["default", "second"]):
        for which in (model, alone):
            set_adapter(which, names)
        for _ in range(2):
            calls.clear()
            torch.testing.assert_close(model(x), alone(x))
    calls.clear()
    set_adapter(model, "second")
    model(x)
    assert calls == [2]  # q and k; v and o have no adapter of this name
    assert groups(model)["qk"] == ""
    assert groups(model)["v"] == ANOTHER_WAY
    set_adapter(model, "default")
    delete_adapter(model, "second")
    calls.clear()
    model(x)
    assert calls == [3, 1]


def test_merged_and_disabled(calls):
    model, x = net().eval(), some_x()
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)
    assert groups(model)["q"] == ANOTHER_WAY
    unmerge(model)
    with disable_adapters(model):
        assert not torch.allclose(model(x), expected)
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert calls == [3, 1]


CHANGES = ["lora_A", "lora_B", "weight", "bias", "frozen", "x", "grad", "autocast", "adapter", "replaced", "eval"]


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_between_the_calls_has_effect(what):
    model, x = net(lora_dropout=0.5 if what == "eval" else 0.0), some_x().requires_grad_()
    inject(model, LoraConfig(target_modules=["k"], init_lora_weights=False), "second")
    set_adapter(model, "default")
    model(x)
    k, adapter = model.blocks[0].k, model.blocks[0].k.adapters.default
    x = x + 0
    model.blocks[0].q(x)
    with torch.no_grad():
        if what in ("lora_A", "lora_B"):
            getattr(adapter, what).add_(1)
        elif what in ("weight", "bias"):
            getattr(k.base_layer, what).add_(1)
        elif what == "x":
            x.add_(1)
    if what == "frozen":
        adapter.requires_grad_(False)
    elif what == "adapter":
        set_adapter(model, "second")
    elif what == "replaced":
        k.base_layer.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
    elif what == "eval":
        k.eval()
    with torch.set_grad_enabled(what != "grad"), torch.autocast("cpu", enabled=what == "autocast"):
        y = k(x)
        alone = k(x)
    assert y.dtype == alone.dtype
    assert y.requires_grad == alone.requires_grad
    torch.testing.assert_close(y, alone)
    if y.requires_grad:
        y.sum().backward()
        assert (adapter.lora_A.grad is None) == (what in ("frozen", "adapter"))


def test_a_layer_trained_apart_from_its_neighbours():
    model, x = net(), some_x()
    model(x)
    model.blocks[0].k.adapters.default.requires_grad_(False)
    grads = step(model, x)
    assert "blocks.0.q.adapters.default.lora_A" in grads
    assert model.blocks[0].k.adapters.default.lora_A.grad is None


def test_autocast_and_inference_mode(calls):
    model, x = net(), some_x()
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        calls.clear()
        y = model(x)
        assert calls == [3, 1]
    assert y.dtype == torch.bfloat16
    with torch.inference_mode():
        calls.clear()
        torch.testing.assert_close(model(x), plain.detach())
        assert calls == [1] * 4
    model(x)
    assert groups(model)["qkv"] == ""


def test_dispatch_modes_see_the_op():
    class Counter(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "lora_ext":
                self.names.append(op._opname)
            return op(*args, **(kwargs or {}))

    model, x = net(), some_x()
    expected = model(x)
    with Counter():
        torch.testing.assert_close(model(x), expected)
    assert Counter.names == ["lora_linear_siblings", "lora_linear"]


def test_transforms():
    model, x = net(), some_x()
    model(x)
    alone = net(share_inputs=False)
    for transform in (
        lambda model: torch.func.vmap(model)(x),
        lambda model: torch.func.grad(lambda x: model(x).sum())(x),
        lambda model: torch.func.jvp(model, (x,), (x,))[1],
        lambda model: torch.autograd.functional.hessian(lambda x: model(x).sum(), x[:1]),
    ):
        torch.testing.assert_close(transform(model), transform(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_of_another_dtype_are_refused_as_before(dtype):
    model = net()
    with pytest.raises((TypeError, ValueError), match=r"^lora_linear: "):
        model(some_x().to(dtype))
