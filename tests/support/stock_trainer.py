"""Runs of the stock Trainer for a few steps, and the values that they train."""

from __future__ import annotations

import torch
from support.models import token_ids
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments


def rows(model: nn.Module) -> list[dict]:
    torch.manual_seed(1)
    labels = (lambda ids, i: i % 2) if isinstance(model, BertForSequenceClassification) else (lambda ids, i: ids)
    return [{"input_ids": ids, "labels": labels(ids, i)} for i, ids in enumerate(token_ids(12).tolist())]


def trainer(model: nn.Module, directory, **options) -> Trainer:
    options = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "max_steps": 3} | options
    arguments = TrainingArguments(
        str(directory), report_to=[], per_device_train_batch_size=2, disable_tqdm=True, use_cpu=True, seed=3, **options
    )
    return Trainer(model, arguments, train_dataset=rows(model), eval_dataset=rows(model)[:4])


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(second, first, rtol=0, atol=0)


class Spoil(TrainerCallback):
    """Spoils the adapter after step 2, so that an earlier one is the best."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            noise = torch.Generator().manual_seed(0)  # the same in every release
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=30)
