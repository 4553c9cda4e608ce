"""Merges that are refused: every layer keeps its bits and its merge state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.merged_models import (
    add_adapter,
    all_same,
    assert_restores,
    hard_layer,
    hard_model,
    merged_sets,
    refused,
    weights,
)
from support.merging import same_bits
from support.models import llama
from torch import nn

from lora_ext import AdapterPool, LoraConfig, inject, merge, set_adapter, unmerge
from lora_ext.adapters import disable_adapters, lora_modules, merge_and_unload
from lora_ext.merging.weights import merge_all_, pack_factors, unmerge_all_
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


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "to": lambda model: model.to(torch.float64),
    "half and back": lambda model: model.half().float(),
    "one layer's base": lambda model: model["layer1"].base_layer.bfloat16(),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_converted_while_merged(how):
    model = hard_model([torch.float32, torch.float32])
    merge(model, "a")
    CONVERSIONS[how](model)
    text = r"was converted from torch.float\d+ to torch.float\d+ while merged|torch.bfloat16 now, but torch.float32 was"
    for change in (
        lambda: unmerge(model),
        lambda: merge(model, "b"),
        lambda: merge(model, "c"),
        model["layer1"].unmerge,
    ):
        with refused(model, (RuntimeError, TypeError), text):
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
        (lambda: model["layer0"].merge("b", "c"), KeyError, r"no adapter 'c'; the adapters are \['a', 'b'\]"),
        (lambda: model["layer0"].merge("b", "a"), RuntimeError, "adapter 'a' is already merged"),
        (lambda: model["layer0"].unmerge("a", "b"), RuntimeError, "adapter 'b' is not merged"),
    ]:
        with refused(model, error, text):
            change()
    assert_restores(model, pristine)


def test_a_weight_tied_while_another_adapter_is_merged():
    model = inject(llama().eval(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False), "a")
    for _, layer in lora_modules(model):
        add_adapter(layer, "b", 2, 1e-2)
    pristine = weights(model)
    merge(model, "a")
    model.model.embed_tokens.weight = model.lm_head.base_layer.weight
    with refused(model, ValueError, "the weight of 'lm_head' is shared with 'model.embed_tokens'"):
        merge(model, "b")
    assert_restores(model, pristine)


def test_a_computed_weight():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.ModuleList([hard_layer(torch.float32), hard_layer(torch.float32)])
    pristine = weights(model)
    torch.nn.utils.parametrize.register_parametrization(model[1].base_layer, "weight", Double())
    for change in (lambda: merge(model), lambda: merge_and_unload(model), model[1].merge):
        with refused(model, RuntimeError, "the weight.* is not a parameter but computed; remove its parametrization"):
            change()
    torch.nn.utils.parametrize.remove_parametrizations(model[1].base_layer, "weight", leave_parametrized=False)
    merge(model)
    torch.nn.utils.parametrize.register_parametrization(model[1].base_layer, "weight", Double())
    with refused(model, RuntimeError, "unmerge: the weight of '1' is not a parameter but computed"):
        unmerge(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[1].base_layer, "weight", leave_parametrized=False)
    assert_restores(model, pristine)


# --- weights that share memory ----------------------------------------------------------------------------------------


def test_layers_whose_weights_share_memory_are_refused():
    model = nn.ModuleDict({name: hard_layer(torch.bfloat16) for name in ("x", "y", "z")})
    whole = torch.cat([model["x"].weight, model["x"].weight])
    rows = model["x"].weight.shape[0]
    for offset in (0, 1, rows - 1):
        model["x"].base_layer.weight = nn.Parameter(whole[:rows], requires_grad=False)
        model["z"].base_layer.weight = nn.Parameter(whole[offset : offset + rows], requires_grad=False)
        for change in (lambda: merge(model, "a"), lambda: merge_and_unload(model)):
            with refused(model, RuntimeError, r"weights\[0\] shares memory with weights\[2\], which would change"):
                change()
    model["z"].base_layer.weight = nn.Parameter(whole[rows:], requires_grad=False)  # adjacent
    before = weights(model)
    merge(model, "a")
    unmerge(model)
    assert all_same(weights(model), before)


@pytest.mark.parametrize(
    ("cuts", "overlap"),
    [
        ([(0, 300), (300, 600)], False),
        ([(0, 256), (300, 600), (260, 270)], False),
        ([(0, 300), (299, 600)], True),
        ([(0, 256), (600, 610), (200, 300)], True),
    ],
    ids=str,
)
def test_blocks_of_columns_of_one_matrix(cuts, overlap):
    """Blocks of a packed q, k, v projection: disjoint, though their address ranges overlap."""
    whole = torch.randn(20, 650)
    blocks = [whole[:, begin:end] for begin, end in cuts]
    factors = [pack_factors(whole.dtype, [(torch.randn(2, b.shape[1]), torch.randn(20, 2), 0.5)]) for b in blocks]
    arguments = "test", blocks, [A for A, _ in factors], [B for _, B in factors]
    before = whole.clone()
    if overlap:
        with pytest.raises(RuntimeError, match="shares memory"):
            merge_all_(*arguments)
    else:
        records = merge_all_(*arguments)
        assert not same_bits(whole, before)
        unmerge_all_("test", blocks[::-1], records[::-1])
    assert same_bits(whole, before)


def test_without_an_active_adapter_the_message_says_why(tmp_path):
    model = inject(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with disable_adapters(model), pytest.raises(RuntimeError, match="no adapter is active .*outside disable_adapters"):
        merge(model)
    set_adapter(model, [])
    with pytest.raises(RuntimeError, match="call set_adapter"):
        merge(model)
    model = llama()
    with AdapterPool(model, tmp_path, target_modules=["q_proj"], r=2, max_bytes=10**6):
        for function in (merge, merge_and_unload):
            with pytest.raises(RuntimeError, match="no adapter is active .*load_adapter"):
                function(model)
