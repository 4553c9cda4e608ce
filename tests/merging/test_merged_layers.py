"""Merged layers and models: the set of merged adapters determines every bit of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from support.merged_models import (
    NAMES,
    all_same,
    assert_restores,
    hard_layer,
    hard_model,
    merged_sets,
    weights,
)
from support.merging import FLOATING, merged, same_bits
from support.properties import given, settings, st

from lora_ext import merge, unmerge
from lora_ext.adapters import lora_modules

# Some weights are far larger than their updates.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounding to 16 bits keeps less than")


def dtype_id(value) -> str:
    return str(value).replace("torch.", "")


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["merge", "unmerge"]), st.sets(st.sampled_from(NAMES), min_size=1)),
    min_size=1,
    max_size=9,
)


# --- the set determines the weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_several_adapters_are_rounded_once(dtype):
    layer = hard_layer(dtype, (3, 11))
    pristine = layer.weight.clone()
    layer.merge("c")
    layer.merge("a")
    chosen = [layer.adapters[name] for name in ("a", "c")]
    assert same_bits(layer.weight, merged(pristine, [(x.lora_A, x.lora_B, x.scaling) for x in chosen]))


@pytest.mark.full
@settings(max_examples=80, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(FLOATING), min_size=1, max_size=3),
    actions=ACTIONS,
    exponents=st.tuples(*[st.integers(-40, 17)] * 3),
    seed=st.integers(0, 2**32),
)
def test_any_order_of_merges_and_unmerges(dtypes, actions, exponents, seed):
    torch.manual_seed(seed)
    model = hard_model(dtypes, sizes=[2.0**e for e in exponents])
    pristine, state = copy.deepcopy(model), set()
    known = {name for _, layer in lora_modules(model) for name in layer.adapters}
    for action, names in actions:
        names = (names & state if action == "unmerge" else names - state) & known
        if not names:
            continue
        after = state | names if action == "merge" else state - names
        before = weights(model), merged_sets(model)
        try:
            (merge if action == "merge" else unmerge)(model, sorted(names, reverse=True))
        except ValueError as error:
            # Also on unmerging: the sum of the remaining updates may overflow although the sum of all did not.
            assert torch.float16 in dtypes and "the sum overflows torch.float16" in str(error)
            assert all_same(weights(model), before[0]) and merged_sets(model) == before[1]
            continue
        state = after
        for (_, layer), (_, untouched) in zip(lora_modules(model), lora_modules(pristine), strict=True):
            assert {*layer.merged_adapters} == state & layer.adapters.keys()
            expected = copy.deepcopy(untouched)
            if layer.is_merged:
                expected.merge(*layer.merged_adapters)
            assert same_bits(layer.weight, expected.weight)
            assert layer.merge_record_bytes == expected.merge_record_bytes
    assert_restores(model, weights(pristine))


@pytest.mark.parametrize("merge_inside", [True, False])
def test_inference_mode(merge_inside):
    layer = hard_layer(torch.bfloat16)
    layer.base_layer.requires_grad_(True)  # an unfrozen weight is merged, too
    pristine = layer.weight.clone()
    with torch.inference_mode(merge_inside):
        layer.merge("a")
    with torch.inference_mode(not merge_inside):
        layer.merge("b")
        layer.unmerge("a")
    layer.unmerge()
    assert same_bits(layer.weight, pristine) and layer.weight.requires_grad and layer.weight.is_leaf


@pytest.mark.cpu_only("GPUs have no such mode")
def test_flushing_subnormals_does_not_change_adapters_that_stay():
    layer = hard_layer(torch.float32)
    with torch.no_grad():  # a subnormal factor of an update that is not subnormal
        layer.adapters.a.lora_A.fill_(1e38), layer.adapters.a.lora_B.fill_(1e-41)
    pristine = layer.weight.clone()
    layer.merge("a")
    only_a = layer.weight.clone()
    assert not same_bits(only_a, pristine)
    try:
        assert torch.set_flush_denormal(True)
        layer.merge("b")
        layer.unmerge("b")
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(layer.weight, only_a)
    layer.unmerge()
    assert same_bits(layer.weight, pristine)


# --- copies, devices and state dicts ----------------------------------------------------------------------------------


@pytest.mark.cpu_only("moves from the CPU by itself")
def test_moved_to_a_gpu_and_back(gpu):
    model = hard_model(FLOATING)
    pristine = weights(model)
    merge(model, "a")
    only_a = weights(model)
    merge(model.to(gpu), "b")
    unmerge(model, "b")
    assert all_same([weight.cpu() for weight in weights(model)], only_a)
    unmerge(model.cpu())
    assert all_same(weights(model), pristine)


# --- the record -------------------------------------------------------------------------------------------------------


def test_layers_without_corrections_keep_only_factors():
    layer = hard_layer(torch.float32, sizes=(0.1, 0.1, 0.1))
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.randint(-99, 99, (9, 270)).clamp(min=0))
        for factor in (layer.adapters.a.lora_A, layer.adapters.a.lora_B):
            factor.copy_(torch.randint(-4, 4, factor.shape))
    layer.adapters.a.scaling = 0.5
    pristine = layer.weight.clone()
    layer.merge("a")
    assert not same_bits(layer.weight, pristine) and layer.merge_record_bytes == 4 * 2 * (9 + 270)
    layer.unmerge()
    assert same_bits(layer.weight, pristine)
