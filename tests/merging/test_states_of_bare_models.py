"""A base model's state_dict, also that of a merged model in files, is refused by an injected model with a remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import Net, bert, llama, refused
from support.stock_trainer import trainer
from transformers import TrainerCallback

from lora_ext import LoraConfig, inject, merge, unmerge
from lora_ext.nn.state import base_keys

CASES = {
    "linear": (Net, {"target_modules": ["up", "head"]}, "blocks.0.up.weight"),
    "head": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, "query.weight"),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "embed_tokens.weight"),
}
OPTIONS = [{"strict": False}, {"strict": False, "assign": True}, {}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_bare_or_a_merged_models_state_is_refused(case, options):
    make, config, key = CASES[case]
    base = make()
    model = inject(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    merged = merge(copy.deepcopy(model))
    with base_keys():
        of_merged = merged.state_dict()
    for state in (base.state_dict(), of_merged):
        for target in (model, merged):
            with refused(target, RuntimeError, "load_state_dict", key, "the base model's key", "unmerge", "inject"):
                target.load_state_dict(dict(state), **options)


@pytest.mark.parametrize("case", CASES)
def test_partial_states_are_taken(case):
    make, config, _ = CASES[case]
    model = inject(make(), LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    other = inject(make(), LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    state = other.state_dict()
    for wanted in ("adapters.", "base_layer", "norm"):
        part = {key: value for key, value in state.items() if wanted in key}
        model.load_state_dict(part, strict=False)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in part.items())
    model.load_state_dict({"unknown.weight": torch.zeros(1)} | state, strict=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_layers_without_adapters_take_the_base_models_values():
    base, model = Net(), inject(Net(), LoraConfig(target_modules=["up"]))
    model.load_state_dict({"head.weight": base.head.weight, "norm.bias": base.norm.bias + 1}, strict=False)
    assert torch.equal(model.head.weight, base.head.weight)


class MergedWhileSaved(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        merge(model)

    def on_save(self, args, state, control, model=None, **kwargs):
        unmerge(model)


@pytest.mark.cpu_only("the Trainer chooses the device")
def test_the_trainer_does_not_silently_go_on_without_a_merged_checkpoint(tmp_path):
    model = inject(bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 8, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, **options)
    run.add_callback(MergedWhileSaved())
    with pytest.raises(RuntimeError, match="the base model's key"):
        run.train()
    with pytest.raises(RuntimeError, match="the base model's key"):
        run.train(resume_from_checkpoint=True)
