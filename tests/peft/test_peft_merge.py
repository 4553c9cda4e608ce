"""Merging accelerated PEFT layers: PEFT's bookkeeping and errors, and exact restoration of the weights."""

import gc

import pytest
import torch
from support.models import assert_unchanged, llama, logits, snapshot, token_ids
from support.peft_pairs import config, factors, model_pair, pair
from torch import nn

from lora_ext.merging.weights import MergeRecord


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def changed_elements(model: nn.Module, before: dict[str, torch.Tensor]) -> int:
    after = weights(model)
    assert after.keys() == before.keys()
    return sum(
        (weight.view(torch.int8) != before[name].view(torch.int8)).sum().item() for name, weight in after.items()
    )


def linear_pair(*options: dict, dtype: torch.dtype = torch.bfloat16, bias: bool = True):
    return pair(nn.Sequential(nn.Linear(24, 40, bias)).to(dtype), *(config(target_modules=["0"], **o) for o in options))


def test_a_tied_weight_with_two_updates_is_unmerged_as_in_peft():
    """Neither layer finds the result of its merge."""
    theirs, ours = pair(llama(True).bfloat16(), config(target_modules=["embed_tokens", "lm_head", "q_proj"]))
    before = weights(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="PEFT subtracts the update"):
        ours.unmerge_adapter()
    theirs.unmerge_adapter()
    assert changed_elements(ours, before) <= changed_elements(theirs, before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_several_adapters_in_any_order(safe_merge):
    theirs, ours = linear_pair({}, {"r": 9, "lora_bias": True}, {"lora_alpha": -5})
    before, layers = weights(ours), [model.base_model.model[0] for model in (theirs, ours)]
    for layer in layers:
        layer.merge(safe_merge=safe_merge, adapter_names=["2"])
        with pytest.warns(UserWarning, match="Already following adapters were merged 2"):
            layer.merge(safe_merge=safe_merge, adapter_names=["1", "2", "default"])
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            layer.merge(safe_merge=safe_merge, adapter_names=["1"])
        assert layer.merged_adapters == ["2", "1", "default"] and layer.merged
    for name in ("weight", "bias"):
        ours_merged, theirs_merged = (getattr(layer.base_layer, name) for layer in reversed(layers))
        torch.testing.assert_close(ours_merged, theirs_merged, rtol=0.02, atol=0.02)
    layers[1].unmerge()
    assert changed_elements(ours, before) == 0 and layers[1].merged_adapters == []
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        layers[1].unmerge()


def live_records() -> set[int]:
    gc.collect()
    return {id(entry) for entry in gc.get_objects() if isinstance(entry, MergeRecord)}


def test_merge_and_unload_keeps_no_record():
    theirs, ours = model_pair("llama", torch.bfloat16)
    ids, before = token_ids(), live_records()
    expected = logits(theirs.merge_and_unload(), ids)
    unloaded = ours.merge_and_unload()
    assert type(unloaded) is type(llama()) and not any("lora" in name for name, _ in unloaded.named_modules())
    torch.testing.assert_close(logits(unloaded, ids), expected, rtol=0.05, atol=0.05)
    assert live_records() <= before


def test_the_adapter_may_change_or_go_while_merged():
    """PEFT's layer would keep the update of a deleted adapter forever."""
    _, ours = linear_pair({}, {})
    before, layer = weights(ours), ours.base_model.model[0]
    layer.merge(adapter_names=["default", "1"])
    for factor in factors(ours).values():
        factor.data.normal_()
    layer.scaling["default"] = 17.0
    layer.delete_adapter("1")
    layer.unmerge()
    assert changed_elements(ours, before) == 0


@pytest.mark.parametrize("what", ["weight", "bias", "dtype"])
def test_a_weight_changed_while_merged_is_unmerged_as_in_peft(what):
    theirs, ours = linear_pair({"lora_bias": True}, dtype=torch.float32)
    for model in (theirs, ours):
        model.merge_adapter()
        torch.manual_seed(0)
        if what == "dtype":
            model.to(torch.bfloat16)
        else:
            getattr(model.base_model.model[0].base_layer, what).data.normal_()
    theirs.unmerge_adapter()
    with pytest.warns(UserWarning, match="has been replaced or changed since: PEFT subtracts"):
        ours.unmerge_adapter()
    tolerance = {"rtol": 0.02, "atol": 0.01} if what == "dtype" else {}
    torch.testing.assert_close(weights(ours), weights(theirs), **tolerance)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_results_that_are_not_finite(broken):
    theirs, ours = linear_pair({})
    for model in (theirs, ours):
        factors(model).popitem()[1].data[0, 0] = broken
    before = weights(ours)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        ours.base_model.model[0].merge(safe_merge=True)
    assert changed_elements(ours, before) == 0 and not ours.base_model.model[0].merged
    for model in (theirs, ours):
        model.merge_adapter()  # PEFT merges them without safe_merge
    assert ours.base_model.model[0].merged_adapters == ["default"]
    torch.testing.assert_close(weights(ours), weights(theirs), equal_nan=True)
    ours.unmerge_adapter()
    assert ours.base_model.model[0].merged_adapters == []


@pytest.mark.parametrize("safe_merge", [False, True])
def test_lora_bias_without_a_base_bias_is_refused_before_anything_changes(safe_merge):
    with pytest.warns(UserWarning, match="has no bias"):
        _, ours = linear_pair({"lora_bias": True}, bias=False)
    before = snapshot(ours)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True` because the base layer has"):
        ours.base_model.model[0].merge(safe_merge=safe_merge)
    assert_unchanged(ours, before)
