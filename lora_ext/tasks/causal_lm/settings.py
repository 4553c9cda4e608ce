"""Settings of ``--task causal-lm``: those of a classifier's run, with other defaults, and a few more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import extra_arguments
from lora_ext.tasks.finetune.settings import Settings

TASK = "causal-lm"

METHODS = ("lora", "full", "bitfit", "adapter-h", "adapter-l", "adapter-p", "adapter-drop")
"""Methods for decoders. Prefixes change the positions of a text's tokens, and a decoder has no new head."""

_OF_CLASSIFIERS = ("label_column", "pooling", "class_weights", "trim_vocabulary")

LONG_TEXTS = ("refuse", "drop", "truncate")
"""Treatments of texts of more than ``max_length`` tokens; truncate cuts their ends."""


@dataclass(frozen=True)
class CausalSettings(Settings):
    """Settings of one run. None selects the demo's model or data, or the default learning rate of the method.

    The rate is ten times that of full fine-tuning, as Schulman et al. 2025 found ("LoRA Without Regret").
    """

    task: str = TASK
    lora_dropout: float = 0.05
    epochs: float = 2.0
    batch_size: int = 8
    max_length: int = 1024
    long_texts: str = "refuse"
    packing: bool = False
    chat_template_file: str | None = None
    answers: int = 100
    max_new_tokens: int = 64

    BEST_METRICS: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    INPUTS: ClassVar[tuple[str, ...]] = (*Settings.INPUTS, "chat_template_file")
    IS_CLASSIFIER: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if unsuitable := [name for name in self.method.split("+") if name not in METHODS]:
            raise TaskError(
                f"--task {TASK}: --method {unsuitable[0]} is not for language models, want one of "
                f"{', '.join(METHODS)}, or several joined by +"
            )
        if self.learning_rate is None:
            full = {"full"} & {*self.method.split("+")}
            object.__setattr__(self, "learning_rate", 5e-5 if full else 5e-4)
        super().__post_init__()
        for name in _OF_CLASSIFIERS:
            if getattr(self, name) != getattr(Settings, name):
                raise TaskError(f"--{name.replace('_', '-')} goes with classification, not with --task {TASK}")
        if self.task != TASK:
            raise TaskError(f"--task is {self.task!r}, want {TASK}")
        if self.long_texts not in LONG_TEXTS:
            raise TaskError(f"--long-texts is {self.long_texts!r}, want one of {', '.join(LONG_TEXTS)}")
        if self.answers < 0:
            raise TaskError(f"--answers is {self.answers}, want at least 0")
        if self.max_new_tokens < 1:
            raise TaskError(f"--max-new-tokens is {self.max_new_tokens}, want at least 1")


def only_causal() -> list[str]:
    """Names of the settings that classification does not have."""
    known = {field.name for field in fields(Settings)}
    return [field.name for field in fields(CausalSettings) if field.name not in known]


def option_list(options: Mapping[str, Any]) -> list[str]:
    """Returns the ``options`` of a run that differ from its method's defaults, as the command line has them."""
    defaults = asdict(CausalSettings(method=options["method"])) | {"method": Settings.method}
    changed = {name: value for name, value in options.items() if value is not None and value != defaults[name]}
    parts = [part for item in extra_arguments.items(changed.pop("set", "")) for part in ("--set", item)]
    for name, value in changed.items():
        parts += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return ["--task", TASK, *parts]


def command_line(settings: CausalSettings, out: Path) -> list[str]:
    """Returns the command that repeats a run."""
    return ["lora-ext", "finetune", *option_list(asdict(settings)), "--out", str(out)]
