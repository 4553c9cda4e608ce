"""save_method says what load_method will not restore: parameters that the method does not train, other adapters."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from support.models import bert, shaken, token_ids

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.methods import apply_method, load_method, new_method, save_method

LORA = {"target_modules": ["query"]}


@pytest.mark.parametrize(("name", "options"), [("adapter-h", {}), ("lora+prefix-embed", LORA), ("lora", LORA)])
def test_parameters_that_the_user_unfroze_are_named(name, options, tmp_path):
    model = apply_method(bert(), new_method(name, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_method(model, tmp_path)
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    with pytest.warns(UserWarning) as caught:
        save_method(model, tmp_path)
    assert len(caught) == 1
    for fragment in ("save_method: ", "LayerNorm.weight", name, "one of 2", "load_method will not restore"):
        assert fragment in str(caught[0].message)


@pytest.mark.parametrize("name", ["bitfit", "full", "head-only"])
def test_methods_that_train_in_place_have_nothing_to_name(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_method(apply_method(bert(), new_method(name)), tmp_path)


def test_an_adapter_that_is_no_part_of_the_method_is_named_and_not_written(tmp_path):
    base = bert()
    model = shaken(apply_method(base, new_method("adapter-h")), by=0.3)
    inject(model, LoraConfig(r=2, init_lora_weights=False, **LORA)).eval()
    with pytest.warns(UserWarning, match=r"adapters \['default'\] are not a part of adapter-h.*save_adapter"):
        save_method(model, tmp_path / "method")
    assert sorted(os.listdir(tmp_path / "method")) == ["method.json", "method.safetensors"]
    save_adapter(model, tmp_path / "adapter")
    ids = token_ids()
    bare = bert()
    bare.load_state_dict({key: value for key, value in _bare_state(model).items() if "bottleneck" not in key})
    again = load_adapter(load_method(bare, tmp_path / "method"), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def _bare_state(model):
    return {
        key.replace("base_layer.", ""): value for key, value in model.state_dict().items() if "adapters." not in key
    }


def test_a_second_adapter_next_to_the_methods_is_named(tmp_path):
    model = apply_method(bert(), new_method("lora+prefix-embed", **LORA))
    inject(model, LoraConfig(r=2, **LORA), "later")
    with pytest.warns(UserWarning, match=r"adapters \['later'\] are not a part of lora\+prefix-embed"):
        save_method(model, tmp_path)
    assert "adapter_model.safetensors" in os.listdir(tmp_path)
