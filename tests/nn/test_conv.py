"""LoraConv against a convolution with the updated weight, and against PEFT."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from support.models import refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import merge_and_unload

ALIVE = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}

# Layers from 6 to 8 channels, named by their spatial dimensions: every kind of stride, padding, dilation and groups.
LAYERS = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d same": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "1d circular": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2}),
    "2d": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2d pointwise": (nn.Conv2d, {"kernel_size": 1, "bias": False}),
    "2d oblong": (nn.Conv2d, {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "2d valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid", "dilation": 3}),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "dilation": 2}),
    "2d replicate": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"}),
    "3d": (nn.Conv3d, {"kernel_size": 2, "stride": 2, "padding": 1, "bias": False}),
    "3d same": (nn.Conv3d, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    "1d grouped": (nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "2d grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "stride": 2, "bias": False}),
}
PEFT_DIFFERS = [name for name, (_, settings) in LAYERS.items() if {"dilation", "padding_mode"} & settings.keys()]


class ConvNet(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        kind, settings = LAYERS[name]
        self.conv = kind(6, 8, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(-1))


def input_for(name: str, batch: int = 3) -> Tensor:
    spatial = {"1d": (11,), "2d": (9, 10), "3d": (5, 6, 7)}[name[:2]]
    return torch.randn(batch, 6, *spatial, dtype=torch.float64)


def adapted(name: str, **settings) -> nn.Module:
    return inject(ConvNet(name).double(), LoraConfig(**{"target_modules": ["conv", "head"]} | ALIVE | settings))


def test_a_model_reads_the_sizes_of_its_convolution():
    """Whisper asks for the stride, MobileNetV2 pads by kernel size and dilation."""
    settings = {"kernel_size": 3, "stride": 2, "dilation": (1, 2), "padding": 1}
    base = nn.Conv2d(6, 8, **settings)
    layer = inject(nn.Sequential(copy.deepcopy(base)), LoraConfig(target_modules=["0"]))[0]
    for name in (*settings, "groups", "padding_mode", "in_channels", "out_channels"):
        assert getattr(layer, name) == getattr(base, name)
    with pytest.raises(AttributeError, match="'Conv2d' object has no attribute 'strides'"):
        _ = layer.strides


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "settings", [{}, {"lora_bias": True, "use_rslora": True, "rank_pattern": {"conv": 2}}], ids=str
)
def test_peft_computes_the_same_from_our_file(name, settings, tmp_path):
    base, x = ConvNet(name).double(), input_for(name).requires_grad_()
    ours = inject(copy.deepcopy(base), LoraConfig(**{"target_modules": ["conv", "head"]} | ALIVE | settings))
    if ours.conv.adapters.default.lora_bias is not None:
        nn.init.normal_(ours.conv.adapters.default.lora_bias)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter key|keys).*")
        warnings.filterwarnings("ignore", message=".*(groups > 1|has no bias).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    layer, mine = theirs.base_model.model.conv, ours.conv.adapters.default
    for convolution in layer.lora_A.values() if name in PEFT_DIFFERS else ():  # settings that PEFT drops
        for setting in ("dilation", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(convolution, setting, getattr(layer.base_layer, setting))
    pairs = [(mine.lora_A, layer.lora_A.default.weight), (mine.lora_B, layer.lora_B.default.weight)]
    if mine.lora_bias is not None:
        pairs.append((mine.lora_bias, layer.lora_B.default.bias))
    results = []
    for model, leaves in zip((ours, theirs), zip(*pairs, strict=True), strict=True):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *leaves])])
    torch.testing.assert_close(*results)
    y, one = ours.conv(x), ours.conv(x[0])  # without a batch
    assert y.stride() == ours.conv.base_layer(x).stride()
    torch.testing.assert_close(one, y[0])
    torch.testing.assert_close(torch.autograd.grad(one.sum(), x), torch.autograd.grad(y[0].sum(), x))
    if "grouped" not in name and (layer.base_layer.bias is not None or mine.lora_bias is None):
        merge(ours)
        theirs.merge_adapter()
        torch.testing.assert_close(ours.conv.weight, layer.base_layer.weight)
        torch.testing.assert_close(ours.conv.bias, layer.base_layer.bias)


@pytest.mark.parametrize("name", ["1d", "2d grouped", "3d"])
def test_we_compute_the_same_from_pefts_file(name, tmp_path):
    base, x = ConvNet(name).double(), input_for(name)
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["conv"], **ALIVE))
        theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), theirs(x))


def test_grouped_updates_are_not_merged():
    model = adapted("2d grouped").eval()
    for operation in (merge, merge_and_unload):
        with refused(model, ValueError, "groups=2 cannot be merged", "run unmerged"):
            operation(model)


def test_lora_bias_without_a_bias_is_not_merged():
    model = adapted("3d", target_modules=["conv"], lora_bias=True).eval()
    with refused(model, ValueError, "lora_bias cannot be merged, as the base layer has no bias"):
        merge(model)


def test_a_layer_whose_memory_format_changed_is_not_unmerged():
    model = merge(adapted("2d")).eval()
    model.to(memory_format=torch.channels_last)
    weight = model.conv.weight.clone()
    with pytest.raises(RuntimeError, match="the weight of 'conv' was converted to another memory format while merged"):
        unmerge(model)
    assert torch.equal(model.conv.weight, weight)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), "its weight is computed by a parametrization"),
        (nn.ConvTranspose2d(6, 8, 3), "no LoRA layer adapts ConvTranspose2d"),
    ],
)
def test_convolutions_that_cannot_be_adapted(layer, reason):
    model = ConvNet("2d")
    model.conv = layer
    with refused(model, TypeError, f"conv ({type(layer).__name__}): {reason}", "nn.Conv1d, nn.Conv2d or nn.Conv3d"):
        inject(model, LoraConfig(target_modules=["conv", "head"]))


def test_a_rank_that_is_not_a_multiple_of_the_groups():
    model = ConvNet("1d grouped")
    with refused(model, ValueError, "the rank 3 of 'conv' is not a multiple of its groups=2", "rank_pattern"):
        inject(model, LoraConfig(target_modules=["head", "conv"], rank_pattern={"conv": 3}))


def test_orthogonal_initialisation():
    model = ConvNet("2d")
    with refused(model, ValueError, "orthogonal initialisation needs plain matrices"):
        inject(model, LoraConfig(target_modules=["head", "conv"], init_lora_weights="orthogonal"))
