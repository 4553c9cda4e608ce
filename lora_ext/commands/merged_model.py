"""Merges the trained adapter of a fine-tuning run, and writes the plain model (``--merged true``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lora_ext.adapters import lora_modules, merge_and_unload
from lora_ext.commands.options import CommandError
from lora_ext.commands.training_options import TaskOptions

_TOKENS = 1000  # of training texts, for which quantised weights are rounded


def check_mergeable(options: TaskOptions, training: TrainingArguments) -> None:
    """Checks, before anything is loaded, that the run ends with a model whose file holds all of it.

    CommandError: the method has other parts than LoRA, the model is sharded, or its config cannot say the pooling.
    """
    if options.method != "lora":
        raise CommandError(f"--merged goes with --method lora, not with {options.method}")
    if training.fsdp or training.deepspeed:
        raise CommandError("--merged: the weights are sharded; merge the saved adapter (lora-ext merge)")
    if getattr(options, "pooling", "default") == "mean":
        raise CommandError("--merged: a checkpoint does not say --pooling mean; leave one of them out")


def write_merged(run: Any, directory: Path) -> dict[str, Any]:
    """Merges the adapter for good, writes model and tokenizer, and returns the scores of the merged model.

    Quantised weights are rounded for some training texts, so that they keep most of the update. All processes merge;
    the first one writes.
    """
    trainer = run.trainer
    layers = [layer.base_layer for _, layer in lora_modules(trainer.model)]
    is_quantised = any(not weight.is_floating_point() for layer in layers for weight in layer.parameters())
    model = merge_and_unload(trainer.model, calibration=_training_batches(trainer) if is_quantised else None)
    if trainer.is_world_process_zero():
        model.save_pretrained(directory)
        run.tokenizer.save_pretrained(directory)
    trainer.accelerator.wait_for_everyone()
    return run.scores()


def _training_batches(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Returns batches of training texts with about enough tokens for each process."""
    rows, tokens, count = trainer.train_dataset, 0, 0
    while count < len(rows) and tokens < _TOKENS * trainer.args.world_size:
        tokens += len(rows[count]["input_ids"])
        count += 1
    loader = trainer.get_eval_dataloader(rows.select(range(count)))
    return [
        {name: x for name, x in batch.items() if isinstance(x, torch.Tensor) and name != "labels"} for batch in loader
    ]
