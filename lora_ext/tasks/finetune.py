"""``lora-ext finetune``: fine-tunes a text classifier with ``transformers.Trainer``; reports what it cost and gave."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from lora_ext.adapters import merge_and_unload, trainable_parameter_counts
from lora_ext.methods import Method, apply_method, head_parameter_count, new_method, option_names, save_method
from lora_ext.methods.prefix_embed import SpecialTokens

from . import TaskError, demo, report
from .data import (
    DATA_FILE,
    Example,
    Splits,
    fingerprint,
    label_names,
    read_examples,
    save_fingerprint,
    saved_fingerprint,
    split_examples,
    without_texts_of,
)
from .lora_targets import lora_targets, split_names
from .run_directory import check_out, prepare_out
from .settings import SETTINGS_FILE, Settings
from .trainer import FinetuneTrainer, build_trainer, forward_of, last_checkpoint, predict, train

_OUTPUTS = (SETTINGS_FILE, DATA_FILE, "checkpoints", "adapter", "model", "metrics.json", "loss_curve.png")
_OUTPUTS += ("predictions.jsonl",)


class Encoded(NamedTuple):
    """Texts as token ids, shortest first: batches of like length need little padding."""

    examples: list[Example]
    rows: list[dict[str, Any]]  # {"input_ids": [...], "labels": class index}
    classes: np.ndarray  # [num_examples] class indices


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
    transformers.logging.set_verbosity_error()
    check_out(out, resume, overwrite, marker=SETTINGS_FILE, what="a fine-tuning run")
    checkpoint = last_checkpoint(out) if resume else None
    splits = load_data(settings, say)
    texts = fingerprint(splits)
    if resume and saved_fingerprint(out) not in (None, texts):
        raise TaskError(f"--resume: the texts are not those that the run in {out} was started with; begin a new run")
    labels = label_names([example for split in splits for example in split])
    model_path = model_path_of(settings.model)
    say(f"loading {model_path} ...")
    set_seed(settings.seed)  # the new head, and the adapters
    tokenizer, model = load_model(model_path, labels, settings.max_length)
    full_checkpoint_bytes = report.tensor_bytes(model)
    head_parameters = head_parameter_count(model)
    adapt(model, settings, model_path)
    trainable, total = trainable_parameter_counts(model)
    say("tokenising ...")
    train_rows, validation_rows, test_rows = (encode(split, tokenizer, labels, settings.max_length) for split in splits)
    _check_room(model, [*train_rows.rows, *validation_rows.rows, *test_rows.rows])

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
        **report.made_by(),
        "machine": report.machine(),
        "settings": asdict(settings),
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "examples": {name: len(split) for name, split in splits._asdict().items()},
        "data_sha256": texts,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "head_parameters": head_parameters,
        "before": before,
        "validation": _last_validation(trainer.state.log_history),
        "after": _score(logits, test_rows),
        "train_seconds": throughput.seconds,
        "tokens_per_second": throughput.tokens / throughput.seconds if throughput.seconds else 0.0,
        "peak_memory_bytes": peak_memory,
        "full_checkpoint_bytes": full_checkpoint_bytes,
    }
    if settings.method == "full":
        trainer.save_model(str(out / "model"))
        tokenizer.save_pretrained(out / "model")
    else:
        save_method(model, out / "adapter")
        metrics["adapter_bytes"] = report.directory_bytes(out / "adapter")
        say("comparing with the base model ...")
        models = {"base": load_model(model_path, labels, settings.max_length)[1].to(model.device), "adapted": model}
        metrics["latency"] = _latencies(trainer, settings, models, test_rows)
        if settings.method == "lora":
            say("merging the adapter, and comparing the merged model with the base model ...")
            merged = {"base": models["base"], "merged": merge_and_unload(model)}
            merged_logits = predict(trainer, test_rows.rows)
            metrics["merged"] = {
                **_score(merged_logits, test_rows),
                "max_logit_difference": float(np.abs(merged_logits - logits).max()),
                **_latencies(trainer, settings, merged, test_rows),
            }

    report.write_predictions(out / "predictions.jsonl", test_rows.examples, logits, test_rows.classes, labels)
    title = f"{settings.method}, {len(train_rows.rows):,} texts"
    report.plot_loss(out / "loss_curve.png", trainer.state.log_history, title)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    say(f"\n{report.table(metrics)}\n\nin {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if settings.model is None or settings.data is None:
        say(demo.CREDIT)
    return metrics


def load_data(settings: Settings, say: Callable[[str], None]) -> Splits:
    if settings.data is None:
        name, examples = "the demo data", demo.examples(say)
    else:
        name = settings.data
        examples = read_examples(name, settings.text_column, settings.label_column)
    if settings.eval_file is None:
        splits = split_examples(examples, settings.validation_split, settings.test_split)
    else:
        test = read_examples(settings.eval_file, settings.text_column, settings.label_column)
        examples = without_texts_of(examples, test)
        splits = split_examples(examples, settings.validation_split, 0.0)._replace(test=test)
    if not splits.test:
        raise TaskError(f"{name}: no text is left for testing; raise --test-split, or name an --eval-file")
    known = label_names(splits.train)
    if len(known) < 2:
        raise TaskError(f"{name}: every text for training has the label {known[0]!r}; a classifier needs at least two")
    for side, examples in (("validation", splits.validation), ("test", splits.test)):
        if unknown := sorted({example.label for example in examples} - set(known)):
            raise TaskError(f"{name}: labels {unknown} occur in the {side} texts only; for training there are {known}")
    sizes = ", ".join(f"{len(split):,} for {side}" for side, split in splits._asdict().items())
    say(f"{name}: {sizes}; labels {', '.join(known)}")
    return splits


def load_task_model(settings: Settings) -> tuple[PreTrainedModel, str]:
    """The bare model that ``settings`` start from, and its path. TaskError: it or the data cannot be had."""
    splits, path = load_data(settings, say=lambda line: None), model_path_of(settings.model)
    return load_model(path, label_names([each for split in splits for each in split]), settings.max_length)[1], path


def model_path_of(model: str | None) -> str:
    """Local directories by their absolute path: the adapter's config names its base model by it."""
    if model is None:
        return str(demo.model_path())
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def load_model(path: str, labels: list[str], max_length: int) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise TaskError(f"--model {path} cannot be loaded: {error}") from error
    if max_length > tokenizer.model_max_length:
        raise TaskError(f"--max-length is {max_length}, but {path} takes at most {tokenizer.model_max_length} tokens")
    if tokenizer.pad_token is None:  # language models have none
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def adapt(model: PreTrainedModel, settings: Settings, model_path: str) -> PreTrainedModel:
    """Applies the method of ``settings`` to ``model``, which it returns.

    TaskError: the method does not fit the model, or an option is wrong.
    """
    try:
        return apply_method(model, method_for(model, settings, model_path))
    except (ValueError, TypeError) as error:
        raise TaskError(f"--method {settings.method}: {error}") from error


def method_for(model: PreTrainedModel, settings: Settings, model_path: str) -> Method:
    """The method that ``settings`` ask for. ValueError, TypeError: they ask for what cannot be."""
    values = asdict(settings) | {
        **lora_targets(model, settings.target_modules),
        "modules_to_save": split_names(settings.modules_to_save) if settings.modules_to_save else None,
        "base_model_name_or_path": model_path,
    }
    options = {option for name in settings.method.split("+") for option in option_names(name)}
    return new_method(settings.method, **{key: value for key, value in values.items() if key in options})


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int) -> Encoded:
    if not examples:
        return Encoded([], [], np.empty(0, np.int64))
    token_ids = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(examples)), key=lambda index: len(token_ids[index]))
    classes = [labels.index(examples[index].label) for index in order]
    rows = [{"input_ids": token_ids[index], "labels": label} for index, label in zip(order, classes, strict=True)]
    return Encoded([examples[index] for index in order], rows, np.array(classes))


def _check_room(model: PreTrainedModel, rows: list[dict[str, Any]]) -> None:
    """TaskError: the longest text and the special tokens of prefix-embed are more than the model has positions for."""
    longest = max(len(row["input_ids"]) for row in rows)
    for module in model.modules():
        if isinstance(module, SpecialTokens) and module.most_tokens is not None and longest > module.most_tokens:
            raise TaskError(
                f"a text has {longest} tokens, but the model has {module.max_positions} positions, of which "
                f"prefix-embed takes {module.special_tokens}; want --max-length {module.most_tokens}, "
                "or fewer special tokens"
            )


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
