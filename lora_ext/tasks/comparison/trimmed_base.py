"""``--trim-vocabulary`` of compare and sweep: one checkpoint with a trimmed vocabulary, which all runs take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from lora_ext.files import read_json_object
from lora_ext.tasks.finetune.data import Splits
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_model import TaskModel
from lora_ext.tasks.finetune.vocabulary import Trimmed, save_trimmed, trim_task_model
from lora_ext.tasks.shared.whole_files import write_json

_BASE, _RECORD = "base", "base.json"
OUTPUTS = (_BASE, _RECORD)

_ABOUT = ("model", "pooling", "dtype")  # settings that the checkpoint depends on


class TrimmedBase(NamedTuple):
    """A checkpoint that is not written yet."""

    trimmed: Trimmed
    model: PreTrainedModel
    without: frozenset[str]  # parameters that are in no file: of the new head, or missing before

    def save(self, out: Path, settings: Settings, texts: str, say: Callable[[str], None]) -> None:
        """Writes it to ``out``, unless it is there, of the same model and ``texts``. WriteError: the disk refuses."""
        wanted = {"data_sha256": texts, **{name: asdict(settings)[name] for name in _ABOUT}}
        try:
            if read_json_object(out / _RECORD, "", 1_000_000) == wanted and (out / _BASE).is_dir():
                return
        except (OSError, ValueError):
            pass  # not written yet, or damaged
        say(self.trimmed.line())
        save_trimmed(out / _BASE, self.model, self.trimmed.tokenizer, self.without)
        write_json(out / _RECORD, wanted)


def trimmed_base(task_model: TaskModel, splits: Splits) -> TrimmedBase:
    """Trims the model, in place. TaskError: it or its tokenizer cannot be trimmed."""
    trimmed, without = trim_task_model(task_model, splits)
    return TrimmedBase(trimmed, task_model.model, without)


def is_same_run(saved: Settings, wanted: Settings, out: Path) -> bool:
    """Returns whether a run in ``out`` had these settings. The checkpoint in ``out`` may have moved with it."""
    base = str((out / _BASE).resolve())
    if wanted.model == base and Path(saved.model or "").name == _BASE:
        saved = replace(saved, model=base)
    return saved == wanted


def of_base(settings: Settings, out: Path) -> Settings:
    """Returns the settings of a run: those of the trimmed checkpoint in ``out`` if ``settings`` want one."""
    if not settings.trim_vocabulary:
        return settings
    return replace(settings, model=str((out / _BASE).resolve()), trim_vocabulary=False)
