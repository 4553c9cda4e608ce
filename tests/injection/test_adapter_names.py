"""Tests which models take ``adapter_names``: injected ones and their copies; others refuse it, despite ``**kwargs``."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from support.models import llama, refused, token_ids
from torch import Tensor, nn

from lora_ext import AdapterPool, LoraConfig, inject
from lora_ext.adapters import merge_and_unload, unload
from lora_ext.model.mixed_batch import take_adapter_names


class Swallows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.linear(x)


class Chooses(Swallows):
    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        return self.linear(x) * len(adapter_names or [0])


def injected(model: nn.Module) -> nn.Module:
    return inject(model, LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)).eval()


ROWS = {"adapter_names": ["default", "__base__"]}


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_model_and_its_copies_take_it(how):
    model, x = injected(Swallows()), torch.randn(2, 4)
    other = how(model)
    torch.testing.assert_close(other(x, **ROWS), torch.stack([model(x)[0], model.linear.base_layer(x)[1]]))
    assert torch.equal(other(x, adapter_names=None, anything=1), model(x))


def test_a_compiled_model_refuses_it():
    model, x = injected(Swallows()), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    with refused(model, ValueError, "adapter_names: a compiled model", "compiled._orig_mod"):
        compiled(x, **ROWS)
    assert torch.equal(compiled(x, adapter_names=None, anything=1), model(x))


def test_a_second_adapter_adds_no_second_hook():
    model = injected(Swallows())
    inject(model, LoraConfig(r=2, target_modules=["linear"]), "b")
    assert (
        len(model._forward_pre_hooks) == len(model._forward_hooks) == 1 and len(model._load_state_dict_pre_hooks) == 1
    )


def test_it_breaks_no_graph():
    model, x = injected(Swallows()), torch.randn(2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, adapter_names=None), model(x))


def closed_pool(model: nn.Module) -> nn.Module:
    AdapterPool(unload(model), Path(__file__).parent, target_modules=["linear"], r=2, max_bytes=1 << 16).close()
    return model


@pytest.mark.parametrize("undo", [unload, merge_and_unload, closed_pool])
@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_that_took_names_refuses_them_when_its_adapters_are_gone(undo, how):
    """Its forward would swallow them, and a tenant would get the base model's answers."""
    model, x = how(undo(injected(Swallows()))), torch.randn(2, 4)
    with refused(model, ValueError, "Swallows: adapter_names is ['default', '__base__'], but the model has no"):
        model(x, **ROWS)
    assert torch.equal(model(x, adapter_names=None, anything=1), model.linear(x))
    injected(model)(x, **ROWS)
    assert list(model._forward_pre_hooks.values()) == [take_adapter_names]


def test_generate_refuses_them_too():
    model, ids = unload(inject(llama().eval(), LoraConfig(target_modules=["q_proj"]))), token_ids(2)
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(ids, max_new_tokens=2, adapter_names=["default"] * 2)


def test_a_model_without_such_arguments_keeps_no_hook():
    """torch.jit.script cannot compile one."""
    model = inject(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
    assert not merge_and_unload(model)._forward_pre_hooks
