"""Models of which parts are compiled or checkpointed by a wrapper: paths, files and states are those without it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from support.models import Net
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import merge_and_unload, unload


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPPERS = [compiled, checkpoint_wrapper]


def wrapped(model: nn.Module, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrapper(block)
    return model


def config(*targets: str, **options) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("first", ["inject", "wrap"])
def test_files_have_the_plain_paths(wrapper, first, tmp_path):
    base, x = Net().eval(), torch.randn(3, 6)
    options = {"modules_to_save": ["down"], "layers_to_transform": [1], "layers_pattern": ["blocks"]}
    model = copy.deepcopy(base) if first == "inject" else wrapped(copy.deepcopy(base), wrapper)
    inject(model, config("up", **options))
    model = wrapped(model, wrapper) if first == "inject" else model
    expected = model.eval()(x)
    assert not torch.allclose(expected, base(x))
    save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(key.removeprefix("base_model.model.") for key in keys) == [
        "blocks.0.down.weight",
        "blocks.1.down.weight",
        "blocks.1.up.lora_A.weight",
        "blocks.1.up.lora_B.weight",
    ]
    for fresh in (copy.deepcopy(base), wrapped(copy.deepcopy(base), wrapper)):
        torch.testing.assert_close(load_adapter(fresh, tmp_path).eval()(x), expected)


def test_a_layer_that_is_compiled_by_itself():
    """The wrapper calls the module that is in it, also after that was replaced."""
    base, x = Net().eval(), torch.randn(3, 6)
    plain = inject(copy.deepcopy(base), config("up", "head"))
    expected = plain(x)
    model = copy.deepcopy(base)
    model.head = compiled(model.head)
    model(x)
    inject(model, config("up", "head")).load_state_dict(
        {key.replace("head.", "head._orig_mod."): tensor for key, tensor in plain.state_dict().items()}
    )
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(unload(model)(x), base(x))
    plain.head = compiled(plain.head)
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(merge_and_unload(plain)(x), expected)
