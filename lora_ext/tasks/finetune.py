"""``lora-ext finetune``: fine-tunes a sequence classifier with ``transformers.Trainer`` and reports what it cost and gave."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.adapters import merge_and_unload, trainable_parameter_counts

from . import TaskError, demo, report
from .data import Example, Splits, label_names, read_examples, split_examples, without_texts_of
from .settings import Settings
from .trainer import build_trainer, last_checkpoint, predict, train

SETTINGS_FILE = "settings.json"
_OUTPUTS = (SETTINGS_FILE, "checkpoints", "adapter", "model", "metrics.json", "loss_curve.png", "predictions.jsonl")


class Interrupted(Exception):
    """Ctrl-C during training; the checkpoint of the last step is on disk."""


def finetune(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the whole task and leaves adapter/, metrics.json, loss_curve.png and predictions.jsonl in ``out``.

    Returns:
        The content of metrics.json.

    Raises:
        TaskError: a mistake in the settings, the data or the directory; found before training starts.
        Interrupted: after the first Ctrl-C during training.
    """
    transformers.logging.set_verbosity_error()
    check_out(out, resume, overwrite)
    checkpoint = last_checkpoint(out) if resume else None
    splits = _load_data(settings, say)
    labels = label_names([example for split in splits for example in split])

    say(f"loading the model {settings.model or 'of the demo'} ...")
    model_path = settings.model or str(demo.model_path())
    set_seed(settings.seed)  # the new head, and the adapters
    tokenizer, model = _load_model(model_path, labels)
    full_checkpoint_bytes = report.tensor_bytes(model)
    base_model = copy.deepcopy(model).eval() if settings.method == "lora" else None
    if settings.method == "lora":
        _inject(model, settings, model_path)
    trainable, total = trainable_parameter_counts(model)

    train_rows, validation_rows, test_rows = (_encode(split, tokenizer, labels, settings, say) for split in splits)
    collator = DataCollatorWithPadding(tokenizer)
    trainer = build_trainer(model, settings, out, train_rows.rows, validation_rows.rows, collator)
    _clear(out, keep=resume)
    settings.save(out / SETTINGS_FILE)

    say(f"evaluating on {len(test_rows.rows):,} test texts before training ...")
    before = _score(predict(trainer, test_rows.rows), test_rows)
    say(f"training {trainable:,} of {total:,} parameters on {len(train_rows.rows):,} texts ...")
    if not train(trainer, checkpoint):
        raise Interrupted
    peak_memory = report.peak_memory_bytes(model.device)
    say("evaluating on the test texts after training ...")
    logits = predict(trainer, test_rows.rows)

    metrics: dict[str, Any] = {
        "command": ["lora-ext", *sys.argv[1:]],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": report.machine(),
        "settings": settings.__dict__,
        "id2label": dict(enumerate(labels)),
        "examples": {name: len(split) for name, split in splits._asdict().items()},
        "trainable_parameters": trainable,
        "total_parameters": total,
        "before": before,
        "validation": _last_validation(trainer.state.log_history),
        "after": _score(logits, test_rows),
        "train_seconds": trainer.train_seconds,
        "tokens_per_second": trainer.tokens_per_second,
        "peak_memory_bytes": peak_memory,
        "full_checkpoint_bytes": full_checkpoint_bytes,
    }
    if base_model is None:
        trainer.save_model(str(out / "model"))
    else:
        save_adapter(model, out / "adapter")
        metrics["adapter_bytes"] = report.directory_bytes(out / "adapter")
        say("merging the adapter, and comparing the merged model with the base ...")
        merge_and_unload(model)
        merged_logits = predict(trainer, test_rows.rows)
        inputs = collator([{"input_ids": row["input_ids"]} for row in test_rows.rows[: settings.batch_size]])
        models = {"base": base_model.to(model.device), "merged": model.eval()}
        latencies = report.median_latencies(models, inputs.to(model.device))
        metrics["merged"] = {
            **_score(merged_logits, test_rows),
            "max_logit_difference": float(np.abs(merged_logits - logits).max()),
            "base_seconds": latencies["base"],
            "merged_seconds": latencies["merged"],
        }

    report.write_predictions(out / "predictions.jsonl", test_rows.examples, logits, test_rows.classes, labels)
    report.plot_loss(out / "loss_curve.png", trainer.state.log_history, f"{settings.method}, {len(train_rows.rows):,} texts")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    say(f"\n{report.table(metrics)}\n\nin {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if settings.model is None or settings.data is None:
        say(demo.CREDIT)
    return metrics
