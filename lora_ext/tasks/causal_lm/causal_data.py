"""The texts of a run: loaded and split."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm import demo
from lora_ext.tasks.causal_lm.conversations import read_conversations
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.finetune.data import Splits
from lora_ext.tasks.finetune.sides import split_sides


def load_conversations(settings: CausalSettings, say: Callable[[str], None]) -> Splits:
    """Reads and splits the examples; equal prompts land on the same side.

    Raises:
        TaskError: a file is damaged, or a side has no texts.
    """
    if settings.data is None:
        name, examples = demo.DATA, demo.examples(say)
    else:
        name, examples = settings.data, read_conversations(settings.data, settings.text_column)
    read = functools.partial(read_conversations, text_column=settings.text_column)
    splits, _ = split_sides(settings, name, examples, read, say, texts="prompts")
    if settings.chat_template_file is not None and not any(example.is_chat for side in splits for example in side):
        raise TaskError(f"--chat-template-file goes with messages, and {name} has none; leave it out")
    sizes = ", ".join(f"{len(split):,} for {side}" for side, split in splits._asdict().items())
    say(f"{name}: {sizes}")
    return splits
