"""PEFT's adapters around a model with ours, and the reverse: both are refused."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import llama, logits, refused, token_ids

from lora_ext import LoraConfig, inject, load_adapter
from lora_ext.adapters import unload

ALIVE = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
DOORS = "without peft_config; or let PEFT adapt the plain model, and call lora_ext.integrations.peft.accelerate"


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},  # PEFT would adapt the base layers of ours
        {"target_modules": ["base_layer"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_peft_on_top_is_refused_before_anything_changes(options):
    model = inject(llama(), LoraConfig(target_modules=["v_proj", "lm_head"], **ALIVE))
    for adapt in (peft.get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)):
        with refused(model, ValueError, "PEFT cannot adapt an injected model", DOORS):
            adapt(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    peft.get_peft_model(unload(model), peft.LoraConfig(target_modules=["q_proj"]))


def test_functions_of_peft_on_states_name_ours():
    model = inject(llama(), LoraConfig(target_modules=["q_proj"]))
    for function in (peft.get_peft_model_state_dict, lambda model: peft.set_peft_model_state_dict(model, {})):
        with refused(model, KeyError, "default"):
            function(model)


def test_an_injected_part_is_refused_by_its_layers():
    model = llama()
    inject(model.model, LoraConfig(target_modules=["q_proj"], **ALIVE))
    with pytest.raises(ValueError, match=f"LoraLinear: base_layer is a layer of PEFT; .*{DOORS}"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))


def test_save_pretrained_writes_our_adapter_after_add_adapter_was_refused(tmp_path, monkeypatch):
    """Transformers notes PEFT's adapter before PEFT refuses it."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # it wants PEFT 0.22
    base = llama()
    model = inject(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], **ALIVE))
    with pytest.raises(ValueError, match="PEFT cannot adapt an injected model"):
        model.add_adapter(peft.LoraConfig(target_modules=["base_layer"], **ALIVE), "added")
    model.save_pretrained(tmp_path / "saved")
    again = load_adapter(base, tmp_path / "saved")
    ids = token_ids()
    torch.testing.assert_close(logits(again, ids), logits(model.eval(), ids))
