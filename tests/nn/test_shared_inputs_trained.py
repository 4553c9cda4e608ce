"""Layers that share inputs inside what trains and generates: Trainer, accumulation, caches of decoders."""

from __future__ import annotations

import pytest
import torch
from support.models import token_ids
from support.shared_llama import assert_shares, shared_and_alone
from torch import nn
from transformers import Trainer, TrainingArguments

pytestmark = pytest.mark.cpu_only("the Trainer chooses the device")


def assert_same_values(shared: nn.Module, alone: nn.Module) -> None:
    for (name, ours), theirs in zip(shared.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
    ],
    ids=["plain", "accumulation", "reentrant", "not reentrant", "autocast"],
)
def test_trainer(options, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in token_ids(8)]
    models = shared_and_alone()
    losses = []
    for model in models:
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            **options,
        )
        losses.append(Trainer(model, arguments, train_dataset=data).train().training_loss)
    assert_shares(models[0])
    # Autocast rounds the sum of the gradients of one input once instead of twice.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if "bf16" in options else 1e-6)
    if "bf16" not in options:
        assert_same_values(*models)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(cache, beams):
    shared, alone = shared_and_alone()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    ids = token_ids()
    for _ in range(2):
        tokens = [model.eval().generate(ids, **options) for model in (shared, alone)]
        assert torch.equal(*tokens)
    assert_shares(shared)
