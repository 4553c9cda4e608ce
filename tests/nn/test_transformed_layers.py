"""Dropout under torch.func.vmap, and layers that read nested tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lora_ext import LoraConfig, inject, set_adapter
from lora_ext.adapters import merge_and_unload

ALIVE = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}


class Ragged(nn.Module):
    """A model of layers that PyTorch applies to nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.up = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + torch.tanh(self.up(x))


def ragged(*names: str, **options) -> nn.Module:
    model = Ragged().double()
    for name in names:
        inject(model, LoraConfig(**ALIVE, target_modules=["up", "embed"], **options), name)
    return set_adapter(model, names)


def test_dropout_draws_as_vmap_is_told():
    model, ids = ragged("default", lora_dropout=0.5).train(), torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    values = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(model, values, (ids,)).pow(3).mean()

    def gradients(randomness: str) -> Tensor:
        return vmap(grad(loss), (None, 0), randomness=randomness)(values, ids)["up.adapters.default.lora_A"]

    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        gradients("error")
    same, different = gradients("same"), gradients("different")
    torch.testing.assert_close(same, same[:1].expand_as(same))
    assert not torch.allclose(different[0], different[1])


@pytest.mark.parametrize("names", [("default",), ("default", "other")], ids=str)
def test_jagged_tensors(names):
    model, parts = ragged(*names), [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([0, 6, 6, 5])]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    factors = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    assert y.is_nested and y.shape[:2] == x.shape
    expected = torch.cat([model(part) for part in parts])
    torch.testing.assert_close(y.values(), expected)
    grads = (torch.autograd.grad(out.pow(3).sum(), factors) for out in (y.values(), expected))
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(merge_and_unload(model)(x).values(), expected)
