"""The base layer of a LoRA layer is called wherever a call would do more than multiply by its weight."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from support.layers import delta_of
from support.models import Net, gpt2, refused, token_ids
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.falcon.modeling_falcon import FalconLinear

from lora_ext import LoraConfig, functional, inject
from lora_ext.adapters import merge, merge_and_unload, unmerge
from lora_ext.nn import LoraConv, LoraLayer

ALIVE = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor, times: float = 2.0) -> Tensor:
        return times * super().forward(x)


class Transposed(nn.Linear):
    """Returns a view that is not contiguous, of a buffer that it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = F.linear(x, self.weight, self.bias).mT.contiguous()
        return self.kept.mT


class Widened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Leaf(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach().requires_grad_()


class One(nn.Linear):
    """One row for all tokens: an expanded tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


def adapted(layer: nn.Module, **settings) -> nn.ModuleDict:
    model = nn.ModuleDict({"layer": layer, "other": nn.Linear(3, 3)})
    return inject(model, LoraConfig(**{"target_modules": ["layer"]} | ALIVE | settings))


def update_of(layer: LoraLayer, x: Tensor) -> Tensor:
    return F.conv2d(x, delta_of(layer)) if isinstance(layer, LoraConv) else x @ layer.delta_weight().T


# --- what is put there before injection -------------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [ScaledLinear, Transposed, Widened, Leaf, One, Standardized])
def test_subclasses_with_a_forward_of_their_own(kind, format):
    is_conv = kind is Standardized
    base, x = (kind(6, 5, 3), torch.randn(2, 6, 5, 5)) if is_conv else (kind(6, 5), torch.randn(2, 3, 4, 6))
    x = x.to(memory_format=format).requires_grad_()
    expected = base(x).detach().clone()
    model = adapted(base)
    y, adapter = model.layer(x), model.layer.adapters.default
    assert y.dtype == expected.dtype and y.is_contiguous(memory_format=format if is_conv else torch.contiguous_format)
    torch.testing.assert_close(y.float(), (expected + update_of(model.layer, x)).float())  # Widened adds in float32
    trained = adapter.lora_A, adapter.lora_B
    grads = (torch.autograd.grad(out.sum(), trained) for out in (y, update_of(model.layer, x.detach())))
    torch.testing.assert_close(*grads)
    with refused(model, ValueError, f"merge: updates cannot be merged into\n  layer: the forward of {kind.__name__}"):
        merge(model)
    with refused(model, ValueError, "may not be linear in the weight"):
        merge_and_unload(model)
    with refused(model, ValueError, f"{type(model.layer).__name__}: the update cannot be merged: the forward of"):
        model.layer.merge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_falcons_linear_layer_can_be_merged(dtype, bias):
    """Its forward is its own, and the same product."""
    model, x = adapted(FalconLinear(64, 5, bias, dtype=dtype)), torch.randn(4, 64, dtype=dtype)
    weight, y = model.layer.base_layer.weight.clone(), model.layer(x)
    merge(model.eval())
    torch.testing.assert_close(model.layer(x), y, atol=4 * torch.finfo(dtype).eps * y.abs().max().item(), rtol=0)
    unmerge(model)
    assert torch.equal(model.layer.base_layer.weight, weight)


def test_a_class_whose_output_takes_no_update():
    with pytest.raises(TypeError, match="LoraLinear: base_layer returned a tuple, want a tensor"):
        adapted(Pair(6, 5)).layer(torch.randn(4, 6))


# --- weights that a model reads without calling the layer -------------------------------------------------------------


class MambaMixer(nn.Module):
    """Stands for the mixer of Transformers, with the names of its projections."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            setattr(self, name, nn.Linear(6, 6))
        self.conv1d = nn.Conv1d(6, 6, 3, groups=6)


@pytest.mark.parametrize(
    ("device", "package", "hub", "may_run"),
    [
        (True, "kernels", "yes", True),
        (True, "kernels", "0", False),
        (True, "mamba_ssm", "0", True),
        (True, "others", "0", False),
        (False, "mamba_ssm", "yes", False),
    ],
)
def test_layers_that_a_model_reads_without_calling_them(device, package, hub, may_run, monkeypatch, tmp_path):
    tmp_path.joinpath(f"{package}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("USE_HUB_KERNELS", hub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    whys = dict.fromkeys(("dt_proj", "conv1d"), ("reads its weight without calling it", "leave it out"))
    if may_run:
        whys |= dict.fromkeys(("x_proj", "out_proj"), ("passes its weight to kernels", "leave it out", "USE_HUB_K"))
    for name, why in whys.items():
        for targets in ({"target_modules": [name]}, {"target_parameters": [f"{name}.weight"]}):
            model = nn.ModuleDict({"mixer": MambaMixer()})
            with refused(model, TypeError, f"mixer.{name}", "MambaMixer", *why):
                inject(model, LoraConfig(**targets))
    left_out = sorted(f"mixer.{name}" for name in whys if name != "conv1d")
    with pytest.warns(UserWarning, match=re.escape(f"leaves out {left_out} of ModuleDict; name them in target_mod")):
        model = inject(nn.ModuleDict({"mixer": MambaMixer()}), LoraConfig(target_modules="all-linear"))
    adapted_layers = {name for name, child in model.mixer.named_children() if isinstance(child, LoraLayer)}
    assert adapted_layers == {"in_proj", "x_proj", "dt_proj", "out_proj"} - whys.keys()


def test_further_arguments_go_to_the_base_layer():
    model, x = adapted(ScaledLinear(6, 5)), torch.randn(4, 6)
    base = F.linear(x, model.layer.weight, model.layer.bias)
    torch.testing.assert_close(model.layer(x, times=3.0), 3 * base + update_of(model.layer, x))
    with pytest.raises(TypeError, match="times"):
        adapted(nn.Linear(6, 5)).layer(x, times=3.0)


# --- what is put there after injection --------------------------------------------------------------------------------


def double(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    return 2 * y


def hook(base: nn.Linear) -> None:
    base.register_forward_hook(double)


def replace_forward(base: nn.Linear) -> None:
    base.forward = lambda x: 2 * F.linear(x, base.weight, base.bias)


def change_class(base: nn.Linear) -> None:
    base.__class__ = ScaledLinear


def parametrize(base: nn.Linear) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(base, "weight", Twice())
    base.bias.data *= 2


@pytest.mark.parametrize("change", [hook, replace_forward, change_class, parametrize])
@pytest.mark.parametrize("num_adapters", [1, 2])
def test_changes_of_the_base_layer_have_effect(change, num_adapters):
    model, x = adapted(nn.Linear(6, 5)), torch.randn(4, 6)
    update = update_of(model.layer, x)
    if num_adapters == 2:
        inject(model, LoraConfig(target_modules=["layer"], lora_bias=True, **ALIVE), "second")
        model.layer.set_active("default", "second")
        second = model.layer.adapters.second
        nn.init.normal_(second.lora_bias)
        update = update + x @ model.layer.delta_weight("second").T + second.scaling * second.lora_bias
    expected = 2 * F.linear(x, model.layer.weight, model.layer.bias) + update
    change(model.layer.base_layer)
    torch.testing.assert_close(model.layer(x), expected)


def test_a_replaced_base_layer_has_effect():
    model, x = adapted(nn.Linear(6, 5)), torch.randn(4, 6)
    update = update_of(model.layer, x)
    model.layer.base_layer = nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 5))
    torch.testing.assert_close(model.layer(x), model.layer.base_layer(x) + update)
    model.layer.to(torch.float64)
    with pytest.raises(ValueError, match=r"base_layer is a torch\.nn\.modules\.container\.Sequential; merge or unload"):
        merge(model)


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "module_forward"])
def test_hooks_see_the_call(kind):
    model, x, seen = adapted(nn.Linear(6, 5)), torch.randn(4, 6, requires_grad=True), []
    base, expected = model.layer.base_layer, model.layer(x)
    of_all = kind == "module_forward"
    register = register_module_forward_hook if of_all else getattr(base, f"register_{kind}_hook")
    handle = register(lambda module, *args: seen.append(module))
    try:
        y = model.layer(x)
        y.sum().backward()
    finally:
        handle.remove()
    torch.testing.assert_close(y, expected)
    model.layer(x).sum().backward()
    assert seen == ([base, model.layer] if of_all else [base])


def test_unmerging_is_possible_when_merging_is_not():
    model = adapted(nn.Linear(6, 5))
    before = model.layer.weight.clone()
    merge(model)
    hook(model.layer.base_layer)
    unmerge(model)
    assert torch.equal(model.layer.weight, before)


def test_plain_layers_take_the_fused_op(monkeypatch):
    calls, fused = [], functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *args: calls.append(args) or fused(*args))
    monkeypatch.setattr(functional, "plus_lora_delta", None)
    inject(Net(), LoraConfig(target_modules=["up", "down"], **ALIVE))(torch.randn(4, 6))
    inject(gpt2(), LoraConfig(target_modules=["c_attn"], **ALIVE))(token_ids())
    assert len(calls) == 5


# --- other kinds ------------------------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 1)), weight, bias)


def test_a_convolution_whose_output_has_another_size():
    with pytest.raises(ValueError, match=r"LoraConv: base_layer returned \[2, 4, 3, 5\], but .*\[3, 3\]; exclude"):
        adapted(Padded(3, 4, 3)).layer(torch.randn(2, 3, 5, 5))
