"""Ctrl-C during a change of a model's adapters takes effect after the change."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Net
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter, set_adapter
from lora_ext.adapters import hotswap_adapter
from lora_ext.nn import LoraLinear

pytestmark = pytest.mark.full

CONFIG = LoraConfig(r=2, target_modules=["up"], bias="all", init_lora_weights=False)


def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
    def pressed(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return result

    return pressed


OPERATIONS = {
    "inject": (LoraLinear, "add_adapter", lambda model, _: inject(model, CONFIG, "b")),
    "set_adapter": (torch.Tensor, "copy_", lambda model, _: set_adapter(model, ())),
    "load_adapter": (torch.Tensor, "copy_", lambda model, file: load_adapter(model, file, adapter_name="a")),
    "hotswap_adapter": (torch.Tensor, "copy_", hotswap_adapter),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_change_is_complete_when_the_interrupt_comes(name, monkeypatch, tmp_path):
    owner, method, operation = OPERATIONS[name]
    x, model = torch.randn(3, 6), Net().eval()
    other = inject(copy.deepcopy(model), CONFIG)
    nn.init.constant_(other.norm.bias, 2.0)
    save_adapter(other, tmp_path)
    if name != "inject":
        inject(model, CONFIG, "a")
        nn.init.constant_(model.head.bias, 3.0)
    done = copy.deepcopy(model)
    torch.manual_seed(5)
    operation(done, tmp_path)
    torch.manual_seed(5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, interrupted(getattr(owner, method)))
        operation(model, tmp_path)
    assert torch.equal(model(x), done(x))
    if name == "set_adapter":
        assert torch.equal(set_adapter(model, "a")(x), set_adapter(done, "a")(x))
