"""PEFT's optimizers for LoRA, on an injected model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from support.models import llama, token_ids

from lora_ext import load_adapter


def test_loraplus_trains_an_injected_model_as_peft_s(tmp_path):
    base = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base, tmp_path, trainable=True)
    with pytest.raises((TypeError, ValueError)):  # one that looks for PEFT's layers
        create_lorafa_optimizer(ours, r=4, lora_alpha=8, lr=1e-2)
    ids, losses = token_ids(), []
    for model in (theirs, ours):
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8)
        assert sorted(group["lr"] for group in optimizer.param_groups if group["params"]) == [1e-2, 8e-2]
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
