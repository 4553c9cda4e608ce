"""``lora-ext finetune``: fine-tunes a text classifier with ``transformers.Trainer``; reports what it cost and gave."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding, PreTrainedModel, set_seed

from lora_ext.adapters import merge_and_unload, trainable_parameter_counts
from lora_ext.methods import head_parameter_count, save_method

from . import TaskError, demo, report
from .data import DATA_FILE, fingerprint, save_fingerprint, saved_fingerprint
from .run_directory import check_out, prepare_out, write_json
from .settings import INPUTS, SETTINGS_FILE, Settings, command_line
from .task_data import Encoded, encode, load_data
from .task_model import adapt, check_fits, check_room, load_model, model_path_of, most_tokens
from .trainer import FinetuneTrainer, build_trainer, forward_of, last_checkpoint, predict, train

_OUTPUTS = ("checkpoints", "adapter", "model", "metrics.json", "loss_curve.png", "predictions.jsonl", DATA_FILE)
_OUTPUTS += (SETTINGS_FILE,)  # last, when they are removed: it says whose the others are


def finetune(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Runs the whole task and leaves adapter/, metrics.json, loss_curve.png and predictions.jsonl in ``out``.

    Args:
        say: shows a line to the user.
        on_progress: is told, after every step, the part of the training that is done.

    Returns:
        The content of metrics.json.

    Raises:
        TaskError: a mistake in the settings, the data or the directory; found before training starts.
        Interrupted: after the first Ctrl-C during training.
    """
    inputs = [getattr(settings, name) for name in INPUTS]
    check_out(out, resume, overwrite, marker=SETTINGS_FILE, what="a fine-tuning run", outputs=_OUTPUTS, inputs=inputs)
    checkpoint = last_checkpoint(out) if resume else None
    splits = load_data(settings, say)
    texts = fingerprint(splits)
    if resume and saved_fingerprint(out) not in (None, texts):
        raise TaskError(f"--resume: the texts are not those that the run in {out} was started with; begin a new run")
    labels = splits.labels
    model_path = model_path_of(settings.model)
    say(f"loading {model_path} ...")
    set_seed(settings.seed)  # the new head, and the adapters
    task_model = load_model(model_path, labels, settings.max_length)
    check_fits(task_model, settings)
    tokenizer, model, most = task_model.tokenizer, task_model.model, most_tokens(task_model.model)
    bare = {"head_parameters": head_parameter_count(model), "full_checkpoint_bytes": report.tensor_bytes(model)}
    adapt(model, settings, model_path)
    trainable, total = trainable_parameter_counts(model)
    say("tokenising ...")
    train_rows, validation_rows, test_rows = (encode(split, tokenizer, labels, settings.max_length) for split in splits)
    check_room(model.modules(), most, [*train_rows.rows, *validation_rows.rows, *test_rows.rows])

    def save(out: Path) -> None:
        settings.save(out)
        save_fingerprint(out, texts)

    prepare_out(out, _OUTPUTS, resume, save)
    trainer = build_trainer(
        model, settings, out, train_rows.rows, validation_rows.rows, DataCollatorWithPadding(tokenizer)
    )

    say(f"evaluating on {len(test_rows.rows):,} test texts before training ...")
    before = _score(predict(trainer, test_rows.rows), test_rows)
    say(f"training {trainable:,} of {total:,} parameters on {len(train_rows.rows):,} texts ...")
    throughput = train(trainer, checkpoint, on_progress)
    peak_memory = report.peak_memory_bytes(model.device)
    say("evaluating on the test texts after training ...")
    logits = predict(trainer, test_rows.rows)

    metrics: dict[str, Any] = {
        **report.made_by(command_line("finetune", asdict(settings), out)),
        "machine": report.machine(),
        "settings": asdict(settings),
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "examples": {name: len(split) for name, split in splits._asdict().items()},
        "data_sha256": texts,
        "trainable_parameters": trainable,
        "total_parameters": total,
        **bare,
        "before": before,
        "validation": _last_validation(trainer.state.log_history),
        "after": _score(logits, test_rows),
        "train_seconds": throughput.seconds,
        "tokens_per_second": throughput.tokens / throughput.seconds if throughput.seconds else 0.0,
        "peak_memory_bytes": peak_memory,
    }
    if settings.method == "full":
        trainer.save_model(str(out / "model"))
        tokenizer.save_pretrained(out / "model")
    else:
        save_method(model, out / "adapter")
        metrics["adapter_bytes"] = report.directory_bytes(out / "adapter")
    report.write_predictions(out / "predictions.jsonl", test_rows.examples, logits, test_rows.classes, labels)
    title = f"{settings.method}, {len(train_rows.rows):,} texts"
    report.plot_loss(out / "loss_curve.png", trainer.state.log_history, title)
    write_json(out / "metrics.json", metrics)  # what follows may want more memory than there is
    if settings.method != "full":
        say("comparing with the base model ...")
        base = load_model(model_path, labels, settings.max_length).model.to(model.device)
        metrics |= _beside(base, trainer, settings, test_rows, logits, say)
        write_json(out / "metrics.json", metrics)
    say(f"\n{report.table(metrics)}\n\nin {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if settings.model is None or settings.data is None:
        say(demo.CREDIT)
    return metrics


def _beside(
    base: PreTrainedModel,
    trainer: FinetuneTrainer,
    settings: Settings,
    test_rows: Encoded,
    logits: np.ndarray,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Latencies beside the base model's and, of LoRA, what merging changes: the trainer's model is merged by it."""
    model = trainer.model
    found = {"latency": _latencies(trainer, settings, {"base": base, "adapted": model}, test_rows)}
    if settings.method == "lora":
        say("merging the adapter, and comparing the merged model with the base model ...")
        try:
            merged = merge_and_unload(model)
        except ValueError as error:  # it diverged, and has values that are not finite
            say(f"the adapter cannot be merged: {error}")
            return found
        merged_logits = predict(trainer, test_rows.rows)
        found["merged"] = {
            **_score(merged_logits, test_rows),
            "max_logit_difference": float(np.abs(merged_logits - logits).max()),
            **_latencies(trainer, settings, {"base": base, "merged": merged}, test_rows),
        }
    return found


def _latencies(
    trainer: FinetuneTrainer, settings: Settings, models: dict[str, PreTrainedModel], rows: Encoded
) -> dict[str, float]:
    """Median seconds a forward of the longest texts takes each of ``models``, as ``<name>_seconds``."""
    batch = trainer.data_collator(rows.rows[-trainer.args.eval_batch_size :]).to(trainer.model.device)
    forwards = {name: forward_of(model.eval(), settings) for name, model in models.items()}
    seconds = report.latencies(forwards, batch)
    return {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}


def _score(logits: np.ndarray, encoded: Encoded) -> dict[str, float]:
    predicted = logits.argmax(-1)
    return {
        "accuracy": report.accuracy(predicted, encoded.classes),
        "macro_f1": report.macro_f1(predicted, encoded.classes),
    }


def _last_validation(history: list[dict[str, float]]) -> dict[str, float] | None:
    scores = [entry for entry in history if "eval_accuracy" in entry]
    return {key: scores[-1][f"eval_{key}"] for key in ("loss", "accuracy", "macro_f1")} if scores else None
