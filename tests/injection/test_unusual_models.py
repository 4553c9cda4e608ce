"""Models that have linear layers of other kinds, or parts in wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from support.models import Net, refused
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_ext import LoraConfig, inject, load_adapter, merge, merge_and_unload, save_adapter
from lora_ext.adapters import lora_modules, unload

ALIVE = {"r": 2, "init_lora_weights": False}

# --- subclasses of nn.Linear with a forward of their own --------------------------------------------------------------


class DeepseekV4GroupedLinear(nn.Linear):
    """Each group of the input has its own rows of the weight, as in DeepSeek V4's output projection."""

    def __init__(self) -> None:
        super().__init__(4, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, 3, 4).transpose(0, 1)
        return torch.bmm(groups, self.weight.view(3, 2, 4).mT).transpose(0, 1).reshape(*x.shape[:-2], 3, -1)


def test_a_class_whose_output_is_known_to_take_no_update():
    base, x = nn.Sequential(nn.Linear(4, 4), DeepseekV4GroupedLinear()), torch.randn(2, 3, 4)
    for use_dora in (False, True):
        text = "1 (DeepseekV4GroupedLinear): its forward returns a part of the features"
        with refused(base, TypeError, text, "target_parameters"):
            inject(base, LoraConfig(target_modules=["0", "1"], use_dora=use_dora, **ALIVE))
    with pytest.warns(UserWarning, match=r"leaves out \['1.weight'\].*name them in"):
        model = inject(copy.deepcopy(base), LoraConfig(target_modules="all-linear", **ALIVE))
    assert [path for path, _ in lora_modules(model)] == ["0"]

    model = inject(copy.deepcopy(base), LoraConfig(target_modules=[], target_parameters=["1.weight"], **ALIVE))
    ((_, layer),) = lora_modules(model)
    updated = copy.deepcopy(base)
    with torch.no_grad():
        updated[1].weight += layer.delta_weight()
    torch.testing.assert_close(model(x), updated(x))
    torch.testing.assert_close(merge(model.eval())(x), updated(x))


class Wider(nn.Linear):
    """Appends features, as Idefics' output head does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x], -1)


class Counting(nn.Linear):
    """Keeps the last output, and takes inputs of three rows only."""

    last = None

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-2] == 3
        self.last = super().forward(x)
        return self.last


def test_other_classes_are_called_and_checked_then():
    x = torch.randn(2, 3, 4)
    model = inject(nn.Sequential(Wider(4, 6)), LoraConfig(target_modules=["0"], **ALIVE))
    with pytest.raises(ValueError, match="lora_delta_: lora_B has out_features=6 but y has 10"):
        model(x)
    base = Counting(4, 6)
    model = inject(nn.Sequential(base), LoraConfig(target_modules=["0"], **ALIVE))
    assert model[0].base_layer is base and base.last is None
    torch.testing.assert_close(model(x), base(x) + x @ model[0].delta_weight().T)


# --- parts that a wrapper compiles or checkpoints: paths, files and states are those without it -----------------------


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPPERS = [compiled, checkpoint_wrapper]


def wrapped(model: nn.Module, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrapper(block)
    return model


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("first", ["inject", "wrap"])
def test_files_have_the_plain_paths(wrapper, first, tmp_path):
    base, x = Net().eval(), torch.randn(3, 6)
    options = {"modules_to_save": ["down"], "layers_to_transform": [1], "layers_pattern": ["blocks"]}
    model = copy.deepcopy(base) if first == "inject" else wrapped(copy.deepcopy(base), wrapper)
    inject(model, LoraConfig(target_modules=["up"], **options, **ALIVE))
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
    base, x, config = Net().eval(), torch.randn(3, 6), LoraConfig(target_modules=["up", "head"], **ALIVE)
    plain = inject(copy.deepcopy(base), config)
    expected = plain(x)
    model = copy.deepcopy(base)
    model.head = compiled(model.head)
    model(x)
    inject(model, config).load_state_dict(
        {key.replace("head.", "head._orig_mod."): tensor for key, tensor in plain.state_dict().items()}
    )
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(unload(model)(x), base(x))
    plain.head = compiled(plain.head)
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(merge_and_unload(plain)(x), expected)
