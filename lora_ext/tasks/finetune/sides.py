"""The training, validation and test texts of a run: one file that is split, or a file for each side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.data import Splits, split_examples, without_texts_of
from lora_ext.tasks.finetune.settings import Settings


def split_sides(
    settings: Settings,
    name: str,
    examples: list[Any],
    read: Callable[[str], list[Any]],
    say: Callable[[str], None],
    texts: str = "texts",
) -> tuple[Splits, dict[str, int]]:
    """Splits ``examples``; ``--validation-file`` and ``--test-file`` take the place of a part.

    A text is on one side only: the test file keeps its texts, the validation file those that the test file lacks, and
    the training texts are the rest.

    Args:
        name: the name of ``examples`` in messages.
        read: reads the examples of a file.
        texts: the plural name of what is compared: texts, prompts.

    Returns:
        The sides; and the numbers of texts that were left out because two files have them: leakage in the files, by
        ``"train in test"``, ``"validation in test"`` and ``"train in validation"``, for the files that were named.

    Raises:
        TaskError: a file is damaged, or a side has no texts.
    """
    duplicates: dict[str, int] = {}

    def without(examples: list[Any], name: str, others: list[Any], other_name: str, sides: str) -> list[Any]:
        rest = without_texts_of(examples, others)
        duplicates[sides] = len(examples) - len(rest)
        if dropped := duplicates[sides]:
            say(f"{name}: {dropped:,} {texts} are left out, because {other_name} has them, too")
        if not rest:
            raise TaskError(f"{name}: {other_name} has all its {texts}; want others")
        return rest

    test = validation = None
    if settings.test_file is not None:
        test = read(settings.test_file)
        examples = without(examples, name, test, settings.test_file, "train in test")
    if settings.validation_file is not None:
        validation = read(settings.validation_file)
        if test is not None:
            validation = without(validation, settings.validation_file, test, settings.test_file, "validation in test")
        examples = without(examples, name, validation, settings.validation_file, "train in validation")
    validation_split = settings.validation_split if validation is None else 0.0
    splits = split_examples(examples, validation_split, settings.test_split if test is None else 0.0)
    splits = Splits(
        splits.train,
        splits.validation if validation is None else validation,
        splits.test if test is None else test,
    )
    if not splits.test:
        raise TaskError(f"{name}: no text is left for testing; raise --test-split, or name a --test-file")
    return splits, duplicates
