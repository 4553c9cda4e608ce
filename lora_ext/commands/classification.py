"""``--task classification``: a text classifier, its data, its loss and its scores (by scikit-learn)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from lora_ext.commands import demo
from lora_ext.commands.adapting import adapt, checkpoint_bytes, choose_pooling, keep_head_in_float32, load_model
from lora_ext.commands.data import label_names, split_rows
from lora_ext.commands.options import CommandError, refusing
from lora_ext.commands.results import write_text
from lora_ext.commands.trainer import LoraTrainerMixin
from lora_ext.commands.training_options import ClassifierOptions
from lora_ext.methods import head_parameter_count
from lora_ext.methods.prefix_embed import SpecialTokens


def load(options: ClassifierOptions) -> dict[str, Dataset]:
    """Reads and splits the texts."""
    data = options.data or demo.reviews()
    return split_rows(options, data, (options.text_column, options.label_column), lambda row: row[options.text_column])


class ClassifierTrainer(LoraTrainerMixin, Trainer):
    """A Trainer for classifiers; of outputs it keeps the logits."""

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        loss, outputs, labels = super().prediction_step(*args, **kwargs)
        return loss, outputs[0] if isinstance(outputs, tuple) else outputs, labels


class Run:
    """The adapted model and its trainer.

    Attributes:
        trainer: ready to train.
        about: a line on the data.
        full_checkpoint_bytes: of the whole model.
        head_parameters: of the new head.
    """

    def __init__(self, options: ClassifierOptions, training: TrainingArguments, sides: dict[str, Dataset]) -> None:
        self.options, self.sides = options, sides
        self.labels = label_names(options.data or "the demo data", sides, options.label_column)
        self.about = f"labels {', '.join(self.labels)}"
        options.model = options.model or demo.classifier()
        self.tokenizer, model, drawn = load_classifier(options, self.labels)
        texts = sides["train"][options.text_column]
        if type(self.tokenizer).__name__.startswith("Phobert") and not any("_" in text for text in texts):
            self.about += "; PhoBERT was trained on joined syllables, as in sinh_viên: segment the texts first"
        self.full_checkpoint_bytes = checkpoint_bytes(model)
        self.head_parameters = head_parameter_count(model)
        adapt(model, options, drawn)
        check_length(model, self.tokenizer, options)
        self.rows = {side: self._encoded(rows, side) for side, rows in sides.items()}
        self.trainer = ClassifierTrainer(
            model,
            training,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["validation"] if len(sides["validation"]) else None,
            processing_class=self.tokenizer,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_loss_func=loss_function(self._class_weights(), training.label_smoothing_factor),
            compute_metrics=lambda output: summary_scores(output.predictions.argmax(-1), output.label_ids),
        )
        self.trainer.set_options(options)

    def _encoded(self, rows: Dataset, side: str) -> Dataset:
        """Tokenises texts and sorts them by length, so that batches of an evaluation need little padding."""
        index_of = {label: index for index, label in enumerate(self.labels)}

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            ids = self.tokenizer(batch[self.options.text_column], truncation=True, max_length=self.options.max_length)
            labels = [index_of[str(label)] for label in batch[self.options.label_column]]
            return {**ids, "labels": labels, "length": [len(one) for one in ids["input_ids"]]}

        if not len(rows):
            return rows
        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
        order = np.argsort(encoded["length"][:], kind="stable")
        self.sides[side] = rows.select(order)
        return encoded.select(order).remove_columns("length")

    def _class_weights(self) -> torch.Tensor | None:
        if self.options.class_weights == "none":
            return None
        classes = np.array(self.rows["train"]["labels"][:])
        return torch.tensor(compute_class_weight("balanced", classes=np.arange(len(self.labels)), y=classes))

    def before(self) -> dict[str, Any]:
        """Returns the entries of metrics.json on the time before training: the scores of the most frequent label."""
        most = int(np.bincount(self.rows["train"]["labels"][:]).argmax())
        expected = np.array(self.rows["test"]["labels"][:])
        scores = summary_scores(np.full(len(expected), most), expected)
        return {"labels": self.labels, "majority": {"label": self.labels[most], **scores}}

    def after(self) -> tuple[dict[str, Any], Any]:
        """Returns the entries of metrics.json on the test texts, and the logits.

        CommandError: an output is not finite, so that scores would mean nothing.
        """
        output = self.trainer.predict(self.rows["test"])
        logits, expected = output.predictions, output.label_ids
        if diverged := int((~np.isfinite(logits)).any(axis=-1).sum()):
            raise CommandError(
                f"training diverged: no finite outputs on {diverged} of {len(logits)} test texts; lower --learning_rate"
            )
        predicted, indices = logits.argmax(-1), range(len(self.labels))
        report = classification_report(
            expected, predicted, labels=indices, target_names=self.labels, output_dict=True, zero_division=0
        )
        test = {
            **summary_scores(predicted, expected),
            "per_class": {label: report[label] for label in self.labels},
            "confusion": confusion_matrix(expected, predicted, labels=indices).tolist(),
        }
        return {"test": test}, logits

    def scores(self) -> dict[str, float]:
        """Returns the scores of the model as it is now on the test texts."""
        output = self.trainer.predict(self.rows["test"])
        return summary_scores(output.predictions.argmax(-1), output.label_ids)

    def write_predictions(self, path: Path, logits: np.ndarray) -> None:
        """Writes one JSON object per test text: text, label, predicted label, logits in the order of the labels."""
        lines = []
        for row, scores in zip(self.sides["test"], logits, strict=True):
            text, label = row[self.options.text_column], str(row[self.options.label_column])
            answer = {"predicted": self.labels[scores.argmax()], "logits": [round(float(s), 6) for s in scores]}
            lines.append(json.dumps({"text": text, "label": label, **answer}, ensure_ascii=False) + "\n")
        write_text(path, "".join(lines))

    @staticmethod
    def figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
        """Returns name and text of the scores, for the terminal."""
        test, most = metrics["test"], metrics["majority"]
        rows = [
            ("test accuracy", f"{test['accuracy']:.2%}; always {most['label']!r}: {most['accuracy']:.2%}"),
            ("test macro-F1", f"{test['macro_f1']:.3f}; {most['macro_f1']:.3f}"),
            ("test weighted F1", f"{test['weighted_f1']:.3f}; {most['weighted_f1']:.3f}"),
        ]
        for label, one in list(test["per_class"].items())[:20]:
            scores = f"precision {one['precision']:.3f}, recall {one['recall']:.3f}, F1 {one['f1-score']:.3f}"
            rows.append((f"  {label}", f"{scores} on {one['support']:,.0f} texts"))
        return rows


def load_classifier(options: ClassifierOptions, labels: list[str]) -> tuple[Any, PreTrainedModel, set[str]]:
    """Returns the tokenizer, a bare classifier of ``labels``, and the parameters that the checkpoint lacks."""
    with refusing(f"--model {options.model}", KeyError):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    model, drawn = load_model(
        AutoModelForSequenceClassification,
        options,
        {"pretrained_model_name_or_path": options.model},
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,  # the checkpoint's head can be for other labels
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # language models have none
    model.config.pad_token_id = tokenizer.pad_token_id
    choose_pooling(model, options, drawn)
    if options.dtype != "float32":
        keep_head_in_float32(model)
    return tokenizer, model, drawn


def summary_scores(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Returns accuracy, macro-F1 and weighted F1 of class indices, both ``[num_texts]``."""
    scores = {f"{how}_f1": f1_score(expected, predicted, average=how, zero_division=0) for how in ("macro", "weighted")}
    return {"accuracy": float(accuracy_score(expected, predicted)), **{k: float(v) for k, v in scores.items()}}


def loss_function(weights: torch.Tensor | None, smoothing: float) -> Any:
    """Returns the cross-entropy, times each text's class's weight, over the texts of a step.

    BERT's own loss is the mean over a batch whatever the number of batches in a step.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        losses = F.cross_entropy(outputs["logits"].float(), labels, reduction="none", label_smoothing=smoothing)
        losses = losses if weights is None else losses * weights.to(losses)[labels]
        return losses.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def check_length(model: PreTrainedModel, tokenizer: Any, options: ClassifierOptions) -> None:
    """Raises CommandError if the adapted model or its tokenizer takes fewer tokens than ``--max_length``."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    limits += [module.most_tokens for module in model.modules() if isinstance(module, SpecialTokens)]
    most = min(limit for limit in limits if limit is not None and limit > 0)  # XLNet's config says -1
    if options.max_length > most:
        raise CommandError(f"--max_length is {options.max_length}, but {options.model} takes at most {most} tokens")
