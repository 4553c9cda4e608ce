"""The texts of a run: loaded and split."""

from __future__ import annotations

from collections.abc import Callable

from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm import demo
from lora_ext.tasks.causal_lm.conversations import Example, read_conversations
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.finetune.data import Splits, split_examples, without_texts_of

__all__ = ["load_conversations"]


def load_conversations(settings: CausalSettings, say: Callable[[str], None]) -> Splits:
    """Reads and splits the examples; equal prompts land on the same side.

    Raises:
        TaskError: a file is damaged, or a side has no texts.
    """
    if settings.data is None:
        name, examples = demo.DATA, demo.examples(say)
    else:
        name, examples = settings.data, read_conversations(settings.data, settings.text_column)
    if settings.eval_file is None:
        splits = split_examples(examples, settings.validation_split, settings.test_split)
    else:
        test = read_conversations(settings.eval_file, settings.text_column)
        rest = _without(examples, name, test, settings.eval_file, say)
        splits = split_examples(rest, settings.validation_split, 0.0)._replace(test=test)
    if not splits.test:
        raise TaskError(f"{name}: no text is left for testing; raise --test-split, or name an --eval-file")
    sizes = ", ".join(f"{len(split):,} for {side}" for side, split in splits._asdict().items())
    say(f"{name}: {sizes}")
    return splits


def _without(
    examples: list[Example], name: str, others: list[Example], other_name: str, say: Callable[[str], None]
) -> list[Example]:
    """Leaves out the examples whose prompt ``others`` have too, and says how many."""
    rest = without_texts_of(examples, others)
    if dropped := len(examples) - len(rest):
        say(f"{name}: {dropped:,} texts are left out, because {other_name} has their prompts, too")
    if not rest:
        raise TaskError(f"{name}: {other_name} has all its prompts; no text is left for training")
    return rest
