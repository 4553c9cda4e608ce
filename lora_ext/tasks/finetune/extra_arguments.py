"""``--set name=value``: fields of ``transformers.TrainingArguments`` that finetune has no option for.

In :class:`~lora_ext.tasks.finetune.settings.Settings` they are one string, joined as in a shell: ``a=1 b='two words'``.
"""

from __future__ import annotations

import difflib
import enum
import json
import shlex
import typing
from collections.abc import Sequence
from typing import Any

from lora_ext.tasks import TaskError

_OPTIONS = {
    "learning_rate": "--learning-rate",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulation-steps",
    "activation_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing_kwargs": "--gradient-checkpointing reentrant",
    "gradient_checkpointing": "--gradient-checkpointing",
    "gradient_checkpointing_kwargs": "--gradient-checkpointing reentrant",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "bf16": "--precision bfloat16",
    "fp16": "--precision bfloat16",
    "load_best_model_at_end": "--best-metric",
    "metric_for_best_model": "--best-metric",
    "greater_is_better": "--best-metric",
    "seed": "--seed",
    "data_seed": "--seed",
    "full_determinism": "--seed",
    "output_dir": "--out",
    "overwrite_output_dir": "--overwrite",
    "resume_from_checkpoint": "--resume",
}
_MANAGED = {
    "a run writes, keeps and resumes its checkpoints itself": "save_* hub_* push_to_hub enable_jit_checkpoint "
    "ignore_data_skip restore_callback_states_from_checkpoint auto_find_batch_size",
    "a run decides itself when it evaluates and what it logs": "eval_strategy eval_steps eval_delay eval_on_start "
    "eval_do_concat_batches eval_use_gather_object logging_* log_* report_to run_name project trackio_* disable_tqdm "
    "include_num_input_tokens_seen skip_memory_metrics debug do_train do_eval do_predict",
    "the scores need all texts, in order, with all logits": "prediction_loss_only batch_eval_metrics "
    "include_for_metrics dataloader_drop_last remove_unused_columns label_names",
    "a run groups texts of similar lengths itself": "train_sampling_strategy group_by_length length_column_name",
    "an evaluation would round the trained weights": "bf16_full_eval fp16_full_eval",
    "it would replace modules of the adapted model": "use_liger_kernel liger_kernel_config",
    "a run is one process, or as many as torchrun starts, on GPUs if there are any": "use_cpu no_cuda "
    "local_rank ddp_* fsdp* deepspeed parallelism_config accelerator_config average_tokens_across_devices",
}


def items(text: str) -> list[str]:
    """Splits the string of the settings into its ``name=value``."""
    return shlex.split(text)


def names(text: str) -> list[str]:
    """Returns the names in the string of the settings."""
    return [item.partition("=")[0] for item in items(text)]


def merged(text: str, *more: str) -> str:
    """Adds ``name=value`` to the string of the settings; a later value of a name replaces the earlier one."""
    values = {item.partition("=")[0]: item for item in [*items(text), *more]}
    return shlex.join(values.values())


def check_names(text: str) -> None:
    """Refuses what is no ``name=value``, and names that a run manages; does not import transformers.

    Raises:
        TaskError: says which option to use, or why the name cannot be set.
    """
    try:
        pairs = items(text)
    except ValueError as error:  # an open quote
        raise TaskError(f"--set {text}: {error}") from error
    for item in pairs:
        name, equals, _ = item.partition("=")
        if not (equals and name.isidentifier()):
            raise TaskError(f"--set {item!r}, want NAME=VALUE, such as weight_decay=0.01")
        if name in _OPTIONS:
            raise TaskError(f"--set {name}: use {_OPTIONS[name]}")
        for why, patterns in _MANAGED.items():
            if any(name == p or (p.endswith("*") and name.startswith(p[:-1])) for p in patterns.split()):
                raise TaskError(f"--set {name}: not possible, because {why}")


def typed(text: str) -> dict[str, Any]:
    """Returns ``{name: value}`` with each value in the type of the field.

    Raises:
        TaskError: there is no such field (with the close matches), or the value is none of its type, too small or NaN.
    """
    from transformers import TrainingArguments

    check_names(text)
    kinds = {name: kind for name, kind in typing.get_type_hints(TrainingArguments).items() if not name.startswith("_")}
    kinds = {name: kind for name, kind in kinds.items() if name in TrainingArguments.__dataclass_fields__}
    values = {}
    for item in items(text):
        name, _, value = item.partition("=")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds)
            raise TaskError(
                f"--set {name}: transformers.TrainingArguments has no such field"
                + (f"; close matches: {', '.join(map(repr, close))}" if close else "")
            )
        values[name] = read = _value(name, value, typing.get_args(kinds[name]) or (kinds[name],))
        default = TrainingArguments.__dataclass_fields__[name].default  # None or -1 stand for none; so would 0 steps
        least = 1 if default in (None, -1) and type(read) is int else 0
        if isinstance(read, int | float) and read != default and not read >= least:
            raise TaskError(f"--set {name} is {value!r}, want at least {least}")  # for NaN, too
    return values


def _value(name: str, text: str, kinds: Sequence[Any]) -> Any:
    """Reads ``text`` as the first of the types in ``kinds`` that it can be; the text itself for names of enums."""
    if type(None) in kinds and text.lower() in ("none", "null", ""):
        return None
    origins = {typing.get_origin(kind) or kind for kind in kinds} - {type(None)}
    if bool in origins and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if origins & {dict, list} and text[:1] in ("{", "["):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise TaskError(f"--set {name} is {text!r}, which is not JSON: {error}") from error
        if type(value) in origins:
            return value
    for kind in (int, float):
        if kind in origins:
            try:
                return kind(text)
            except ValueError:
                pass
    if str in origins or any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in origins):
        return text
    names = {bool: "true or false", int: "an integer", float: "a number", dict: "a JSON object"}
    want = " or ".join(names.get(kind, str(kind)) for kind in names if kind in origins)
    raise TaskError(f"--set {name} is {text!r}, want {want}")
