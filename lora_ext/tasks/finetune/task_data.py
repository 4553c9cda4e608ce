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
    shown,
    split_examples,
    without_texts_of,
)
from lora_ext.tasks.finetune.settings import Settings


class Encoded(NamedTuple):
    """Texts as token ids, shortest first, so that batches need little padding."""

    examples: list[Example]
    rows: list[dict[str, Any]]  # {"input_ids": [...], "labels": class index}
    classes: np.ndarray  # [num_examples] class indices


def load_data(settings: Settings, say: Callable[[str], None]) -> Splits:
    """Reads and splits the labelled texts, as :func:`split_sides` does.

    Raises:
        TaskError: a file is damaged, a side has no texts, or labels do not fit together.
    """
    if settings.data is None:
        name, examples = "the demo data", demo.examples(say)
    else:
        name, examples = settings.data, _read(settings.data, settings)
    splits = split_sides(name, examples, lambda path: _read(path, settings), settings, say)
    try:
        check_labels(splits.labels)
    except TaskError as error:
        raise TaskError(f"{name}: {error}") from error
    known = label_names(splits.train)
    if len(known) < 2:
        raise TaskError(f"{name}: every text for training has the label {known[0]!r}; a classifier needs at least two")
    for side, examples in (("validation", splits.validation), ("test", splits.test)):
        if unknown := sorted({example.label for example in examples} - set(known)):
            raise TaskError(
                f"{name}: labels [{shown(unknown)}] occur in the {side} texts only; for training there are "
                f"{shown(known)}. Every label, even a number, is a class that needs training texts; add some, or drop "
                "these labels"
            )
    sizes = ", ".join(f"{len(split):,} for {side}" for side, split in splits._asdict().items())
    say(f"{name}: {sizes}; labels {shown(known)}")
    return splits


def split_sides(
    name: str, examples: list[Any], read: Callable[[str], list[Any]], settings: Settings, say: Callable[[str], None]
) -> Splits:
    """Splits ``examples``, or takes sides from the files that ``settings`` name.

    A text is on one side only: the test file keeps its texts, the validation file those that the test file lacks, and
    the training texts are the rest.

    Args:
        name: the file of the examples, for messages.
        read: reads the examples in a file.

    Raises:
        TaskError: a file is damaged, or a side has no texts.
    """
    test = validation = None
    if settings.test_file is not None:
        test = read(settings.test_file)
        examples = _without(examples, name, test, settings.test_file, say)
    if settings.validation_file is not None:
        validation = read(settings.validation_file)
        if test is not None:
            validation = _without(validation, settings.validation_file, test, settings.test_file, say)
            if not validation:
                raise TaskError(f"{settings.validation_file}: {settings.test_file} has all its texts; want others")
        examples = _without(examples, name, validation, settings.validation_file, say)
    validation_split = settings.validation_split if validation is None else 0.0
    splits = split_examples(examples, validation_split, settings.test_split if test is None else 0.0)
    splits = Splits(
        splits.train,
        splits.validation if validation is None else validation,
        splits.test if test is None else test,
    )
    if not splits.test:
        raise TaskError(f"{name}: no text is left for testing; raise --test-split, or name a --test-file")
    return splits


def _read(path: str, settings: Settings) -> list[Example]:
    return read_examples(path, settings.text_column, settings.label_column)


def _without(
    examples: list[Example], name: str, others: list[Example], other_name: str, say: Callable[[str], None]
) -> list[Example]:
    """Leaves out the texts that ``others`` have too, and says how many."""
    rest = without_texts_of(examples, others)
    if dropped := len(examples) - len(rest):
        say(f"{name}: {dropped:,} texts are left out, because {other_name} has them, too")
    return rest


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int) -> Encoded:
    if not examples:
        return Encoded([], [], np.empty(0, np.int64))
    token_ids = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(examples)), key=lambda index: len(token_ids[index]))
    index_of = {label: index for index, label in enumerate(labels)}
    classes = [index_of[examples[index].label] for index in order]
    rows = [{"input_ids": token_ids[index], "labels": label} for index, label in zip(order, classes, strict=True)]
    return Encoded([examples[index] for index in order], rows, np.array(classes))
