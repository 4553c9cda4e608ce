"""PEFT's optimizers for LoRA, on an injected model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from support.models import llama, token_ids
from torch import nn

from lora_ext import load_adapter


def models(directory: Path) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and the injected one, with the same adapter."""
    base = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(directory)
    return theirs, load_adapter(base, directory, trainable=True)


def test_loraplus_trains_an_injected_model_as_peft_s(tmp_path):
    theirs, ours = models(tmp_path)
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


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2),
        lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2),
    ],
    ids=["LoRA-FA", "Riemannian"],
)
def test_optimizers_that_look_for_peft_s_layers_end_in_an_error(make: Callable[[nn.Module], object], tmp_path):
    theirs, ours = models(tmp_path)
    make(theirs)
    with pytest.raises((TypeError, ValueError)):
        make(ours)
