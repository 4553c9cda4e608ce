"""Injected models under torch.func, forward mode, gradients of gradients and with nested tensors: equal to PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from lora_ext import LoraConfig, inject, set_adapter

ALIVE = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}


class Net(nn.Module):
    """Every kind of layer whose adapter is not one op of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 5, 3, padding=1)
        self.up = nn.Linear(5, 6)
        self.down = nn.Linear(6, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(-1, -2)).transpose(-1, -2)
        return self.down(torch.tanh(self.up(torch.tanh(x))))


class Ragged(nn.Module):
    """A model of layers that PyTorch applies to nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.up = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + torch.tanh(self.up(x))


class Pair:
    """Our model and PEFT's as functions of the same factors, and their values by our names."""

    def __init__(self, model: nn.Module, targets: list[str], *names: str, lora_dropout: float = 0.0) -> None:
        model = model.double()
        options = ALIVE | {"target_modules": targets, "lora_dropout": lora_dropout}
        self.ours, self.theirs = copy.deepcopy(model), None
        for name in names:
            inject(self.ours, LoraConfig(**options), name)
            if self.theirs is None:
                self.theirs = peft.get_peft_model(model, peft.LoraConfig(**options), name)
            else:
                self.theirs.add_adapter(name, peft.LoraConfig(**options))
        set_adapter(self.ours, names)
        self.theirs.base_model.set_adapter(list(names))
        self.values = {name: p.detach() for name, p in self.ours.named_parameters() if "lora_" in name}
        self.functions = self._our_function, self._their_function
        theirs = dict(self.theirs.named_parameters())
        self.peft_names = {}
        for name in self.values:
            path, adapter, factor = name.replace(".adapters.", " ").replace(".lora_", " ").split()
            places = f"lora_{factor}.{adapter}.weight", f"lora_embedding_{factor}.{adapter}"
            (self.peft_names[name],) = {f"base_model.model.{path}.{place}" for place in places} & theirs.keys()

    def _our_function(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.ours, values, (x,))

    def _their_function(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        theirs = {}
        for name, value in values.items():
            key = self.peft_names[name]
            theirs[key] = value.mT if "lora_embedding_A" in key else value
        return functional_call(self.theirs, theirs, (x,))


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda values, x: function(values, x).pow(3).mean()


@pytest.fixture(params=[("default",), ("default", "other")], ids=["one adapter", "two adapters"])
def net(request) -> Pair:
    pair = Pair(Net(), ["embed", "conv", "up", "down"], *request.param)
    assert len(pair.values) == 8 * len(request.param)
    return pair


IDS = torch.tensor([[1, 2, 3, 4], [0, 6, 6, 5], [3, 3, 2, 0]])

TRANSFORMS = {
    "grad": lambda f, v: grad(loss_of(f))(v, IDS),
    "gradients of each sample": lambda f, v: vmap(grad(loss_of(f)), (None, 0))(v, IDS),
    "gradients of each sample, loop": lambda f, v: vmap(grad(loss_of(f)), (None, 0), chunk_size=1)(v, IDS),
    "jacrev": lambda f, v: jacrev(f)(v, IDS),
    "jacfwd": lambda f, v: jacfwd(f)(v, IDS),
    "jvp": lambda f, v: jvp(lambda v: f(v, IDS), (v,), ({k: t.cos() for k, t in v.items()},)),
    "hessian": lambda f, v: hessian(loss_of(f))(v, IDS[0]),
    "many adapters, one input": lambda f, v: vmap(f, (0, None))({k: torch.stack([t, -t]) for k, t in v.items()}, IDS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_as_peft(net, name):
    ours, theirs = (TRANSFORMS[name](function, net.values) for function in net.functions)
    torch.testing.assert_close(ours, theirs)


def test_gradient_penalty_as_peft(net):
    results = []
    for function in net.functions:
        values = {name: value.clone().requires_grad_() for name, value in net.values.items()}
        leaves = list(values.values())
        grads = torch.autograd.grad(loss_of(function)(values, IDS), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves))
    torch.testing.assert_close(*results)


def test_batched_gradients_as_peft(net):
    results, grad_y = [], torch.randn(5, 3, 4, 3).double()
    for function in net.functions:
        values = {name: value.clone().requires_grad_() for name, value in net.values.items()}
        results.append(torch.autograd.grad(function(values, IDS), list(values.values()), grad_y, is_grads_batched=True))
    torch.testing.assert_close(*results)


def test_dual_numbers_as_peft(net):
    with forward_ad.dual_level():
        values = {name: forward_ad.make_dual(value, value.cos()) for name, value in net.values.items()}
        ours, theirs = (forward_ad.unpack_dual(function(values, IDS)) for function in net.functions)
    torch.testing.assert_close((ours.primal, ours.tangent), (theirs.primal, theirs.tangent))


def test_dropout_draws_as_vmap_is_told():
    pair = Pair(Net(), ["up", "down"], "default", lora_dropout=0.5)
    ids = IDS[:1].expand(4, 4)

    def gradients(randomness: str) -> Tensor:
        return vmap(grad(loss_of(pair.functions[0])), (None, 0), randomness=randomness)(pair.values, ids)[
            "up.adapters.default.lora_A"
        ]

    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        gradients("error")
    same, different = gradients("same"), gradients("different")
    torch.testing.assert_close(same, same[:1].expand_as(same))
    assert not torch.allclose(different[0], different[1])


@pytest.mark.parametrize("names", [("default",), ("default", "other")], ids=str)
def test_jagged_tensors_as_peft(names):
    pair, results = Pair(Ragged(), ["up", "embed"], *names), []
    parts = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([0, 6, 6, 5])]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for function in pair.functions:
        values = {name: value.clone().requires_grad_() for name, value in pair.values.items()}
        y = function(values, x)
        assert y.is_nested and y.shape[:2] == x.shape
        y = y.values()
        results.append([y, *torch.autograd.grad(y.pow(3).sum(), list(values.values()))])
    torch.testing.assert_close(*results)
