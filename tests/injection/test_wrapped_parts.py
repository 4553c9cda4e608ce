"""Models of which parts are compiled or checkpointed by a wrapper: paths, files and states are those without it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from support.models import Net, llama, token_ids
from support.versions import before
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import merge_and_unload, unload


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPPERS = [compiled, checkpoint_wrapper]


def wrapped(model: nn.Module, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
    blocks = model.model.layers if hasattr(model, "model") else model.blocks
    for i, block in enumerate(blocks):
        blocks[i] = wrapper(block)
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


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_states_of_the_adapters_alone(wrapper, tmp_path):
    """A checkpoint of Trainer has all adapters, and PyTorch's keys: torch.compile's name stays in them."""
    if wrapper is compiled and before("accelerate", "1.13"):
        pytest.skip("accelerate before 1.13: save_pretrained of a model with a compiled part ends in a KeyError")
    base, ids = llama().eval(), token_ids(2)
    model = inject(wrapped(copy.deepcopy(base), wrapper), config("q_proj"), "first")
    inject(model, config("v_proj"), "second")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {name for name in ("first", "second") if any(f".{name}.lora_A" in key for key in state)} == {
        "first",
        "second",
    }
    for other in (copy.deepcopy(base), wrapped(copy.deepcopy(base), wrapper)):
        inject(inject(other, config("q_proj"), "first"), config("v_proj"), "second")
        if wrapper is compiled and type(other.model.layers[0]) is type(base.model.layers[0]):
            with pytest.raises(RuntimeError, match="and has in addition model.layers.0._orig_mod"):
                other.load_state_dict(dict(state), strict=False)
            continue
        missing, unexpected = other.load_state_dict(dict(state), strict=False)
        assert not missing and not unexpected
        for name in ("first", "second"):
            set_adapter(model, name)
            set_adapter(other, name)
            torch.testing.assert_close(other.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_with_something_else_merged_changes_nothing(wrapper):
    model, x = wrapped(inject(Net().eval(), config("up", "head")), wrapper), torch.randn(3, 6)
    merged = copy.deepcopy(merge(model).state_dict())
    with torch.no_grad():
        unmerge(model).norm.weight.add_(1.0)
    expected = model(x)
    assert not model.load_state_dict(model.state_dict()).missing_keys
    with pytest.raises(RuntimeError, match=r"merged into 'blocks\.0\."):
        model.load_state_dict(merged)
    assert torch.equal(model(x), expected)


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


class HandsOn(nn.Module):
    """Sets its attributes in the model that it wraps, like Lightning Fabric's modules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __setattr__(self, name: str, value: object) -> None:
        if "inner" in self.__dict__.get("_modules", ()):
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_injected_around_a_model_that_gets_the_attributes(tmp_path):
    base, x = Net().eval(), torch.randn(3, 6)
    model = inject(HandsOn(copy.deepcopy(base)), config("up"))
    y = model(x)
    assert not torch.allclose(y, base(x))
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(HandsOn(copy.deepcopy(base)), tmp_path)(x), y)
    torch.testing.assert_close(merge_and_unload(model)(x), y)
