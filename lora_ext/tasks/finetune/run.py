"""``lora-ext finetune``: fine-tunes a text classifier with ``transformers.Trainer``; reports its scores and costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PreTrainedModel, set_seed

from lora_ext.adapters import trainable_parameter_counts
from lora_ext.methods import head_parameter_count, pooling_of
from lora_ext.tasks.finetune import demo, results
from lora_ext.tasks.finetune.data import DATA_FILE, Splits, fingerprint, resumed_fingerprint, save_fingerprint
from lora_ext.tasks.finetune.quantize import quantization_of
from lora_ext.tasks.finetune.run_checkpoints import last_checkpoint, tidy
from lora_ext.tasks.finetune.scores import scores, summary_scores
from lora_ext.tasks.finetune.selection import balanced, best_of, check_has_validation, kept_validation
from lora_ext.tasks.finetune.settings import INPUTS, SETTINGS_FILE, Settings, command_line
from lora_ext.tasks.finetune.task_data import Encoded, encode, load_sides, segmentation_hint
from lora_ext.tasks.finetune.task_model import (
    TaskModel,
    adapt,
    check_fits,
    check_room,
    check_tokens,
    load_model,
    merged_with,
    model_path_of,
    most_tokens,
    sharing,
    targets_of,
)
from lora_ext.tasks.finetune.trained_files import save_trained
from lora_ext.tasks.finetune.trainer import FinetuneTrainer, build_trainer, forward_of, predict, train
from lora_ext.tasks.finetune.training_arguments import check_training_arguments
from lora_ext.tasks.finetune.vocabulary import Trimmed, save_trimmed, trim_task_model
from lora_ext.tasks.shared import measuring, provenance, team
from lora_ext.tasks.shared.run_directory import alone_in_out, check_out, prepare_out, shown_files
from lora_ext.tasks.shared.whole_files import write_json

_BASE = "base"  # the checkpoint with a trimmed vocabulary
_OUTPUTS = (
    _BASE,
    "checkpoints",
    "adapter",
    "model",
    "metrics.json",
    "loss_curve.png",
    "predictions.jsonl",
    DATA_FILE,
    "before.json",
)
_OUTPUTS += (SETTINGS_FILE,)  # removed last: it marks the other files as a run's


@alone_in_out
def finetune(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    measure: bool = True,
    runs_at_once: int = 1,
    say: Callable[[str], None] = print,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Runs the whole task and leaves adapter/, metrics.json, loss_curve.png and predictions.jsonl in ``out``.

    metrics.json is written last: if it exists, the others are whole.

    Args:
        resume: continues from the last checkpoint, or from the beginning if there is none. The result equals that of
            an uninterrupted run bit for bit (on the same machine with the same number of threads).
        measure: times the adapted and the merged model next to the base model, for some seconds.
        runs_at_once: number of runs that share the machine; recorded in metrics.json, because it affects the times.
        say: shows a line to the user.
        on_progress: receives the finished fraction of the training after every step.

    Returns:
        The content of metrics.json.

    Raises:
        TaskError: a mistake in the settings, the data or the directory; found before training starts.
        WriteError: the disk refuses a file; the last checkpoint is whole, and ``resume`` continues from it.
        Interrupted: after the first Ctrl-C, or SIGTERM, during training.
    """
    inputs = [getattr(settings, name) for name in INPUTS]
    marks = {"marker": SETTINGS_FILE, "key": "method", "what": "a fine-tuning run"}
    check_out(out, resume, overwrite, **marks, outputs=_OUTPUTS, inputs=inputs)
    checkpoint = last_checkpoint(out) if resume else None
    splits, duplicates = load_sides(settings, say)
    texts = resumed_fingerprint(splits, out) if resume else fingerprint(splits)
    check_training_arguments(settings, len(splits.train))
    check_has_validation(settings, len(splits.validation))
    if resume and checkpoint is None:
        say(f"{out} has no checkpoint yet: the run starts from the beginning")
    labels = splits.labels
    task_model, trimmed, without = _load(settings, splits, out, say)
    model_path = task_model.path
    tokenizer, model, most = task_model.tokenizer, task_model.model, most_tokens(task_model.model)
    bare = {"head_parameters": head_parameter_count(model), "full_checkpoint_bytes": measuring.tensor_bytes(model)}
    trimmed_base = None if trimmed is None else sharing(model)
    base = sharing(model) if measure and settings.method != "full" else None
    adapt(model, settings, model_path)
    trainable, total = trainable_parameter_counts(model)
    say("tokenising ...")
    train_rows, validation_rows, test_rows = (encode(split, tokenizer, labels, settings.max_length) for split in splits)
    rows = [*train_rows.rows, *validation_rows.rows, *test_rows.rows]
    check_room(model.modules(), most, rows)
    check_tokens(model, rows, model_path)
    if (hint := segmentation_hint(tokenizer, splits.train)) is not None:
        say(hint)

    def save(out: Path) -> None:
        settings.save(out, threads=torch.get_num_threads())
        save_fingerprint(out, texts)
        tidy(out / "checkpoints")
        if trimmed_base is not None:
            save_trimmed(out / _BASE, trimmed_base, tokenizer, without)

    prepare_out(out, _OUTPUTS, resume, save)
    trainer = build_trainer(
        model, settings, out, train_rows.rows, validation_rows.rows, DataCollatorWithPadding(tokenizer)
    )

    if settings.class_weights is not None:
        trainer.class_weights = balanced(train_rows.classes, len(labels))
    say(f"training {trainable:,} of {total:,} parameters on {len(train_rows.rows):,} texts ...")
    progress = train(trainer, checkpoint, on_progress)
    peak_memory = measuring.peak_memory_bytes(model.device)
    say(f"evaluating on {len(test_rows.rows):,} test texts ...")
    logits = predict(trainer, test_rows.rows)
    diverged = int((~np.isfinite(logits)).any(axis=-1).sum())

    metrics: dict[str, Any] = {
        **provenance.made_by(command_line("finetune", asdict(settings), out)),
        "machine": provenance.machine(),
        "settings": asdict(settings),
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "examples": {name: len(split) for name, split in splits._asdict().items()},
        "duplicates": duplicates,
        **_about_vocabulary(trimmed),
        "data_sha256": texts,
        "trainable_parameters": trainable,
        "total_parameters": total,
        **bare,
        "majority": _majority(train_rows, test_rows, labels),
        "validation": kept_validation(trainer.state, ("loss", "accuracy", "macro_f1", "weighted_f1")),
        **best_of(trainer, settings.best_metric),
        "after": scores(logits.argmax(-1), test_rows.classes, labels),
        **({"diverged": diverged} if diverged else {}),
        "processes": team.processes(),
        "train_seconds": progress.seconds,
        "runs_at_once": runs_at_once,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "peak_memory_bytes": peak_memory,
    }
    metrics |= save_trained(model, tokenizer, settings.method, out)
    results.write_predictions(out / "predictions.jsonl", test_rows.examples, logits, test_rows.classes, labels)
    title = f"{settings.method}, {len(train_rows.rows):,} texts"
    results.plot_loss(out / "loss_curve.png", trainer.state.log_history, title)
    write_json(out / "metrics.json", metrics)  # before measuring, which can run out of memory
    if base is not None:
        say("measuring next to the base model ...")
        metrics |= _measure(base, out / "adapter", trainer, settings, test_rows, logits, say)
        write_json(out / "metrics.json", metrics)
    say(f"\n{results.table(metrics)}\n\nin {out}: {', '.join(shown_files(out))}")
    for line in demo.credits(settings.model, settings.data):
        say(line)
    return metrics


def _load(
    settings: Settings, splits: Splits, out: Path, say: Callable[[str], None]
) -> tuple[TaskModel, Trimmed | None, Collection[str]]:
    """Loads the bare model, and checks that the settings fit it.

    Returns:
        The model, what a trimmed vocabulary keeps (None: it is whole), and the parameters that its file leaves out.
    """
    path = model_path_of(settings.model)
    say(f"loading {path} ...")
    set_seed(settings.seed)  # for the new head and the adapters
    task_model = load_model(
        path, splits.labels, settings.max_length, settings.dtype, quantization_of(settings), pooling=settings.pooling
    )
    check_fits(task_model, settings)
    if (targets := targets_of(task_model.model, settings)) != settings.target_modules:
        say(f"{path} tells no input embeddings: LoRA adapts {targets} alone")
    if pooling_of(task_model.model) == "cls":
        say(f"{path} has no pooler: a new one is trained with the head (--pooling mean needs none)")
    if not settings.trim_vocabulary:
        return task_model, None, ()
    trimmed, without = trim_task_model(task_model, splits)
    say(trimmed.line())
    path = str((out / _BASE).resolve())
    # Files that are saved later compare the vocabulary with this checkpoint's.
    task_model.model.name_or_path = task_model.model.config.name_or_path = path
    return task_model._replace(tokenizer=trimmed.tokenizer, path=path), trimmed, without


def _about_vocabulary(trimmed: Trimmed | None) -> dict[str, Any]:
    if trimmed is None:
        return {}
    kept = {"tokens": len(trimmed.kept), "tokens_before": trimmed.before, "bytes_saved": trimmed.bytes_saved}
    return {"trimmed_vocabulary": kept}


_SECONDS = 5.0  # time spent on timing; at least three rounds
_BATCHES = 4  # compared between the adapted and the merged model


def _measure(
    base: PreTrainedModel,
    adapter: Path,
    trainer: FinetuneTrainer,
    settings: Settings,
    test_rows: Encoded,
    logits: np.ndarray,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures median seconds of a forward of the longest texts and, for LoRA, compares the merged model's answers.

    The models take turns, so that a busy machine slows them equally.
    """
    device, size = trainer.model.device, trainer.args.eval_batch_size
    models = {"base": base.to(device), "adapted": trainer.model}
    found: dict[str, Any] = {}
    if settings.method == "lora" and (plain := merged_with(base, adapter, say)) is not None:
        models["merged"] = plain
    forwards = {name: forward_of(model.eval(), settings) for name, model in models.items()}
    if "merged" in models:
        first = max(0, len(test_rows.rows) - _BATCHES * size)
        batches = [test_rows.rows[at : at + size] for at in range(first, len(test_rows.rows), size)]
        with torch.inference_mode():
            outputs = [forwards["merged"](**trainer.data_collator(rows).to(device)).logits for rows in batches]
        merged = torch.cat(outputs).float().cpu().numpy()
        found["merged"] = {
            "texts": len(merged),
            "same_answers": int((merged.argmax(-1) == logits[first:].argmax(-1)).sum()),
            "max_logit_difference": float(np.abs(merged - logits[first:]).max()),
        }
    batch = trainer.data_collator(test_rows.rows[-size:]).to(device)
    seconds = measuring.latencies(forwards, batch, seconds=_SECONDS)
    return found | {"latency": {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}}


def _majority(train_rows: Encoded, test_rows: Encoded, labels: list[str]) -> dict[str, Any]:
    """Scores of always answering the most frequent training label: the baseline."""
    most = int(np.bincount(train_rows.classes).argmax())
    predicted = np.full(len(test_rows.classes), most)
    return {
        "label": labels[most],
        **summary_scores(predicted, test_rows.classes),
    }
