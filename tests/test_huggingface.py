"""Tests injected models with Hugging Face's stock Trainer and generate."""

import copy

import pytest
import torch
from support.models import bert, llama, token_ids
from transformers import Trainer, TrainingArguments

from lora_ext import LoraConfig, inject, merge
from lora_ext.adapters import lora_modules

pytestmark = pytest.mark.cpu_only("the Trainer chooses the device")


def test_stock_trainer_trains_the_adapter_and_nothing_else(tmp_path):
    base = bert()
    model = inject(
        copy.deepcopy(base), LoraConfig(r=4, lora_dropout=0.1, target_modules=["query"], task_type="SEQ_CLS")
    )
    assert type(model) is type(base)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(token_ids(16).tolist())]
    arguments = TrainingArguments(tmp_path, max_steps=4, learning_rate=1e-2, report_to=[], save_strategy="no")
    result = Trainer(model, arguments, train_dataset=rows).train()
    assert result.global_step == 4
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert any("lora_A" in name for name in changed) and any("classifier" in name for name in changed)


def test_generate_before_training_with_an_adapter_and_merged():
    base = llama().eval()
    prompt = token_ids(2)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = base.generate(prompt, **options)
    model = inject(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(model.generate(prompt, **options), expected)

    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.adapters.default.lora_B.normal_()
    adapted = model.generate(prompt, **options)
    assert not torch.equal(adapted, expected)
    assert torch.equal(merge(model).generate(prompt, **options), adapted)
