"""Merges that are refused: every layer keeps its bits and its merge state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.merged_models import all_same, assert_restores, hard_layer, hard_model, merged_sets, weights
from support.merging import same_bits
from support.models import refused
from torch import nn

from lora_ext import merge, unmerge
from lora_ext.adapters import lora_modules
from lora_ext.nn import LoraLinear


def overflow(layer: LoraLinear) -> str:
    layer.adapters["b"].lora_A.mul_(1e3)
    layer.adapters["b"].scaling = 1e36
    return "the sum overflows torch.bfloat16"


def not_a_number(layer: LoraLinear) -> str:
    layer.adapters["b"].lora_A[1, 2] = float("nan")
    return "the adapter has NaN or infinite values"


def infinite(layer: LoraLinear) -> str:
    layer.adapters["b"].lora_B[0, 1] = -float("inf")
    return "the adapter has NaN or infinite values"


@pytest.mark.parametrize("already", [(), ("a", "c")], ids=str)
@pytest.mark.parametrize("spoil", [overflow, not_a_number, infinite])
def test_one_layer_that_would_not_be_finite_leaves_all_unchanged(spoil, already):
    model = hard_model([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    pristine = weights(model)
    if already:
        merge(model, already)
    with torch.no_grad():
        reason = spoil(model["layer2"])
    with refused(model, ValueError, f"of the weight of 'layer2' NaN or infinite: {reason}"):
        merge(model, "b")
    with refused(model, ValueError, f"of the weight NaN or infinite: {reason}"):
        model["layer2"].merge("b")
    assert_restores(model, pristine)


@pytest.mark.filterwarnings("ignore:.*rounding to 16 bits keeps less than")
def test_unmerging_some_may_overflow_and_unmerging_all_does_not():
    layer = hard_layer(torch.float16, sizes=(1.0, 1.0, 1.0))
    with torch.no_grad():
        layer.adapters["a"].lora_A.fill_(4e4), layer.adapters["a"].lora_B.fill_(1.0)
        layer.adapters["b"].lora_A.fill_(-4e4), layer.adapters["b"].lora_B.fill_(1.0)
    layer.adapters["a"].scaling, layer.adapters["b"].scaling = 1.0, 2 / 3  # updates of 8e4 and -8e4
    model = nn.ModuleList([layer])
    pristine = weights(model)
    merge(model, ["a", "b"])
    for name in ("a", "b"):
        with refused(model, ValueError, "the sum overflows"):
            unmerge(model, name)
    assert_restores(model, pristine)


def test_a_weight_that_is_not_finite_is_refused_only_when_merged_first():
    model = hard_model([torch.float32, torch.float32])
    model["layer1"].weight[0, 0] = float("inf")
    with refused(model, ValueError, "of 'layer1' NaN or infinite: the weight has NaN or infinite values"):
        merge(model, "a")


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "to": (lambda m: m.to(torch.float64), RuntimeError, "was converted from torch.float32 to torch.float64 while"),
    "half and back": (lambda m: m.half().float(), RuntimeError, "was converted from torch.float16 to torch.float32"),
    "one layer's base": (lambda m: m["layer1"].base_layer.bfloat16(), TypeError, "bfloat16 now, but torch.float32 was"),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_converted_while_merged(how):
    model = hard_model([torch.float32, torch.float32])
    merge(model, "a")
    convert, error, text = CONVERSIONS[how]
    convert(model)
    for change in (
        lambda: unmerge(model),
        lambda: merge(model, "b"),
        lambda: merge(model, "c"),
        model["layer1"].unmerge,
    ):
        with refused(model, error, text):
            change()
    for _, layer in lora_modules(model):
        layer.forget_merge()
    now = weights(model)
    merge(model, "b")
    unmerge(model)
    assert all_same(weights(model), now)


REPLACEMENTS: dict[str, tuple[Callable, type[Exception] | tuple, str]] = {
    "another shape": (lambda w: w[:, :-1].clone(), ValueError, r"'layer1' has shape \[6, 259\], but \[6, 260\] was"),
    "another dtype": (lambda w: w.half(), TypeError, "'layer1' is torch.float16 now, but torch.bfloat16 was merged"),
    "columns apart": (lambda w: w.T.contiguous().T, ValueError, "'layer1' has column stride 6, want 1"),
    "expanded": (lambda w: w[:1].expand(6, -1), ValueError, "'layer1' has row stride 0 but 260 columns"),
    "no values": (lambda w: w.to("meta"), (RuntimeError, ValueError), "on (the )?meta"),
}


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_weight_replaced_while_merged(how):
    """The other layer has another dtype, so it is in another launch."""
    make, error, text = REPLACEMENTS[how]
    model = hard_model([torch.float32, torch.bfloat16])
    pristine = weights(model)
    merge(model, "a")
    kept = model["layer1"].weight
    model["layer1"].base_layer.weight = nn.Parameter(make(kept), requires_grad=False)
    bits, sets = model["layer0"].weight.clone(), merged_sets(model)
    for change in (lambda: unmerge(model), lambda: merge(model, "b")):
        with pytest.raises(error, match=text):
            change()
        assert same_bits(model["layer0"].weight, bits) and merged_sets(model) == sets
    model["layer1"].base_layer.weight = kept
    assert_restores(model, pristine)


def test_names():
    model = hard_model([torch.float32, torch.float32])
    pristine = weights(model)
    merge(model, ["a"])
    for change, error, text in [
        (lambda: model["layer0"].merge("b", "c"), KeyError, "no adapter 'c'; the adapters are ['a', 'b']"),
        (lambda: model["layer0"].merge("b", "a"), RuntimeError, "adapter 'a' is already merged"),
        (lambda: model["layer0"].unmerge("a", "b"), RuntimeError, "adapter 'b' is not merged"),
    ]:
        with refused(model, error, text):
            change()
    assert_restores(model, pristine)
