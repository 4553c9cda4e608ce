"""Trainers of Transformers and TRL on the tiny chat model of examples/, for tests that compare ways to adapt it."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import transformers
from support.optional import datasets, trl
from torch import nn

_SPEC = importlib.util.spec_from_file_location("tiny_chat", Path(__file__).parents[2] / "examples" / "tiny_chat.py")
tiny_chat = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_chat)

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
_THINGS = list(tiny_chat.COLOURS.items())
CHATS = [{"messages": tiny_chat.question(thing) + tiny_chat.answer(colour)} for thing, colour in _THINGS]
PROMPTS = [{"prompt": tiny_chat.question(thing)} for thing, _ in _THINGS]
PAIRS = [
    {"prompt": tiny_chat.question(thing), "chosen": tiny_chat.answer(colour), "rejected": tiny_chat.answer(wrong)}
    for (thing, colour), (_, wrong) in zip(_THINGS, _THINGS[1:] + _THINGS[:1], strict=True)
]
LABELLED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]
STEPS = 4
_COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}
_TRL = _COMMON | {"bf16": False, "gradient_checkpointing": False}
_SAMPLED = {"num_generations": 4, "max_completion_length": 5, "beta": 0.5, "per_device_train_batch_size": 8}


def tokens() -> list[list[int]]:
    """The chats as ids."""
    words = tiny_chat.tokenizer()
    return [words.apply_chat_template(chat["messages"], return_dict=True)["input_ids"] for chat in CHATS]


def plain(model: nn.Module, directory: Path, **options: Any) -> transformers.Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = transformers.TrainingArguments(str(directory), **_COMMON | options)
    collator = transformers.DataCollatorForSeq2Seq(tiny_chat.tokenizer())
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def of_trl(kind: str, model: nn.Module, directory: Path, peft_config: Any = None, **options: Any) -> Any:
    """Makes TRL's trainer ``kind``: "SFT", "DPO", "KTO", "GRPO" or "RLOO"."""
    rows, defaults = {"SFT": (CHATS, {}), "DPO": (PAIRS, {"beta": 0.5}), "KTO": (LABELLED, {})}.get(
        kind, (PROMPTS, _SAMPLED)
    )
    data = datasets.Dataset.from_list(rows)
    more = {} if rows is not PROMPTS else {"reward_funcs": _reward}
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(str(directory), **_TRL | defaults | options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_chat.tokenizer(),
        peft_config=peft_config,
        **more,
    )


def _reward(completions: list, **columns: Any) -> list[float]:
    return [len(set(completion[0]["content"].split()) & set(tiny_chat.COLOURS.values())) for completion in completions]


sft, dpo, grpo = (functools.partial(of_trl, kind) for kind in ("SFT", "DPO", "GRPO"))


def logged(trainer: transformers.Trainer, *keys: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]
