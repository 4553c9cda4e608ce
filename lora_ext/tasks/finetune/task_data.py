"""The labelled texts of a fine-tuning run: loaded, split and encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import demo
from lora_ext.tasks.finetune.data import (
    Example,
    Splits,
    check_labels,
    label_names,
    read_examples,
    shown_names,
)
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.sides import split_sides


class Encoded(NamedTuple):
    """Texts as token ids, shortest first, so that batches need little padding."""

    examples: list[Example]
    rows: list[dict[str, Any]]  # {"input_ids": [...], "labels": class index}
    classes: np.ndarray  # [num_examples] class indices


def load_data(settings: Settings, say: Callable[[str], None]) -> Splits:
    """Returns the first result of :func:`load_sides`."""
    return load_sides(settings, say)[0]


def load_sides(settings: Settings, say: Callable[[str], None]) -> tuple[Splits, dict[str, int]]:
    """Reads and splits the labelled texts. Returns what :func:`split_sides` returns.

    Raises:
        TaskError: a file is damaged, a side has no texts, or labels do not fit together.
    """
    if settings.data is None:
        name, examples = "the demo data", demo.examples(say)
    else:
        name, examples = settings.data, _read(settings.data, settings)
    splits, duplicates = split_sides(settings, name, examples, lambda path: _read(path, settings), say)
    try:
        check_labels(splits.labels)
    except TaskError as error:
        raise TaskError(f"{name}: {error}") from error
    known = label_names(splits.train)
    if len(known) < 2:
        raise TaskError(f"{name}: every text for training has the label {known[0]!r}; a classifier needs at least two")
    files = {"validation": settings.validation_file, "test": settings.test_file}
    for side, file in files.items():
        examples = getattr(splits, side)
        if unknown := sorted({example.label for example in examples} - set(known)):
            line = min(example.line for example in examples if example.label in unknown)
            raise TaskError(
                f"{file or name}: labels [{shown_names(unknown)}] occur in the {side} texts only, first in line "
                f"{line}; for training there are {shown_names(known)}. Every label, even a number, is a class that "
                "needs training texts; add some, or drop these labels"
            )
    sizes = ", ".join(f"{len(split):,} for {side}" for side, split in splits._asdict().items())
    say(f"{name}: {sizes}; labels {shown_names(known)}")
    return splits, duplicates


def _read(path: str, settings: Settings) -> list[Example]:
    return read_examples(path, settings.text_column, settings.label_column)


def segmentation_hint(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> str | None:
    """Returns a line for users of PhoBERT whose texts are not segmented into words; None if there is nothing to say."""
    if not type(tokenizer).__name__.startswith("Phobert") or any("_" in example.text for example in examples):
        return None
    return (
        "the texts have no underscore: PhoBERT was trained on words whose syllables are joined, as in sinh_viên; "
        "segment the texts first, for example with VnCoreNLP"
    )


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int) -> Encoded:
    if not examples:
        return Encoded([], [], np.empty(0, np.int64))
    token_ids = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(examples)), key=lambda index: len(token_ids[index]))
    index_of = {label: index for index, label in enumerate(labels)}
    classes = [index_of[examples[index].label] for index in order]
    rows = [{"input_ids": token_ids[index], "labels": label} for index, label in zip(order, classes, strict=True)]
    return Encoded([examples[index] for index in order], rows, np.array(classes))
